"""Install the package ``dynamic_detr``: ``pip install -e .``.

Detectron2 is not a requirement, because the package index has no project of this name, and pip
would install any project that somebody uploads under it. The README explains how to install it.
"""

import runpy

from setuptools import find_packages, setup

DRAWING = ["matplotlib>=3.6", "opencv-python-headless"]

setup(
    name="dynamic-detr",
    version=runpy.run_path("dynamic_detr/version.py")["__version__"],
    description="Dynamic DETR (ICCV 2021) as a Detectron2 project",
    license="Apache-2.0",
    packages=find_packages(include=["dynamic_detr", "dynamic_detr.*"]),
    package_data={"dynamic_detr": ["py.typed", "weights/*.safetensors"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "fvcore>=0.1.5",
        "numpy",
        "pillow",
        "pycocotools>=2.0.2,!=2.0.9,!=2.0.10",  # these need "info" in every file
        "safetensors>=0.4",
        "scipy",
        "tqdm",
    ],
    extras_require={
        "demo": DRAWING,
        "test": ["pytest", "hypothesis", "ruff", "transformers", *DRAWING],
    },
)
