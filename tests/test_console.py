"""Terminal output of a run: a short summary, progress from the first iteration, and no colour codes
in pipes. All else is in the log file."""

import re

from test_train_net import _arguments, _run


def test_little_is_printed_before_progress(tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    options = ["--note", "a note", "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "3"]
    assert _run(monkeypatch, *_arguments(tmp_path, *options)) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    before, progress, _ = re.split(r"(?<=\n)(.*iter: 0 .*total_loss.*)", printed, maxsplit=1)
    assert progress and len(before.splitlines()) < 25
    assert f"environment, configuration and model: {output}/log.txt" in before
    log = (output / "log.txt").read_text()
    assert "\x1b" not in log
    for part in ("Environment info", "Running with full config", "Model:", "Command line"):
        assert part in log and part not in printed
    assert log.count("Rank of current process") == 1  # no duplicate handler
    content = (output / "model_final.safetensors").read_bytes()
    assert b"a note" in content[:20000]
