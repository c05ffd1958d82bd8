#!/usr/bin/env python
"""Train or evaluate a detector: Dynamic DETR, or any of Detectron2's own configurations.

Every flag of Detectron2's ``tools/train_net.py`` works here; ``--help`` shows all of them. The
command itself is ``dynamic_detr/cli/train_net.py``.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it: runtime/threads.py

from dynamic_detr.cli.train_net import main

if __name__ == "__main__":
    main()
