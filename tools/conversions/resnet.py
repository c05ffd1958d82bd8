"""ResNet: weights of torchvision, timm and Hugging Face under the names of Detectron2."""

__all__ = ["resnet_rules"]

BOTTOM_UP = "backbone.bottom_up."
NORM = r"(weight|bias|running_mean|running_var)"


def resnet_rules(prefix: str, target: str = BOTTOM_UP) -> list[tuple[str, str | None]]:
    r"""Return the rules of `rename` for a ResNet without classifier.

    Args:
        prefix: pattern of the prefix of the published names, such as r"backbone\.0\.body\.".
        target: prefix of Detectron2's names.
    """
    rules: list[tuple[str, str | None]] = [
        (rf"{prefix}.*num_batches_tracked", None),
        (rf"{prefix}conv1\.weight", rf"{target}stem.conv1.weight"),
        (rf"{prefix}bn1\.{NORM}", rf"{target}stem.conv1.norm.\1"),
    ]
    embedder = rf"{prefix}embedder\.embedder\."  # of Hugging Face
    rules += [
        (rf"{embedder}convolution\.weight", rf"{target}stem.conv1.weight"),
        (rf"{embedder}normalization\.{NORM}", rf"{target}stem.conv1.norm.\1"),
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
