"""Names of a ResNet: torchvision's (and timm's) and Hugging Face's to Detectron2's."""

__all__ = ["resnet_rules"]

BOTTOM_UP = "backbone.bottom_up."
NORM = r"(weight|bias|running_mean|running_var)"  # frozen or not


def resnet_rules(prefix: str, target: str = BOTTOM_UP) -> list[tuple[str, str | None]]:
    r"""Rules for `rename`, of all weights of a ResNet of bottleneck or basic blocks.

    Args:
        prefix: pattern that the published names start with, such as r"backbone\.0\.body\.".
        target: what Detectron2's names start with.

    Returns:
        Rules that take every weight but that of the classifier; running counts are left out.
    """
    rules: list[tuple[str, str | None]] = [
        (rf"{prefix}.*num_batches_tracked", None),
        # torchvision, timm
        (rf"{prefix}conv1\.weight", rf"{target}stem.conv1.weight"),
        (rf"{prefix}bn1\.{NORM}", rf"{target}stem.conv1.norm.\1"),
        # Hugging Face
        (
            rf"{prefix}embedder\.embedder\.convolution\.weight",
            rf"{target}stem.conv1.weight",
        ),
        (
            rf"{prefix}embedder\.embedder\.normalization\.{NORM}",
            rf"{target}stem.conv1.norm.\1",
        ),
    ]
    for stage in range(4):
        new = f"{target}res{stage + 2}."
        old = rf"{prefix}layer{stage + 1}\.(\d+)\."
        rules += [
            (rf"{old}conv(\d)\.weight", rf"{new}\1.conv\2.weight"),
            (rf"{old}bn(\d)\.{NORM}", rf"{new}\1.conv\2.norm.\3"),
            (rf"{old}downsample\.0\.weight", rf"{new}\1.shortcut.weight"),
            (rf"{old}downsample\.1\.{NORM}", rf"{new}\1.shortcut.norm.\2"),
        ]
        old = rf"{prefix}encoder\.stages\.{stage}\.layers\.(\d+)\."
        for conv in range(3):
            layer = rf"{old}layer\.{conv}\."
            rules += [
                (rf"{layer}convolution\.weight", rf"{new}\1.conv{conv + 1}.weight"),
                (rf"{layer}normalization\.{NORM}", rf"{new}\1.conv{conv + 1}.norm.\2"),
            ]
        rules += [
            (rf"{old}shortcut\.convolution\.weight", rf"{new}\1.shortcut.weight"),
            (rf"{old}shortcut\.normalization\.{NORM}", rf"{new}\1.shortcut.norm.\2"),
        ]
    return rules
