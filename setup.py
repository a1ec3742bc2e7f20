"""Packaging. The distribution is `lowrank-engine`; the import name is `lowrank`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

EVAL = ["scikit-learn", "sacrebleu", "rouge-score", "seqeval", "matplotlib"]
DATA = ["datasketch", "phonenumbers", "rapidfuzz", "ftfy"]

setup(
    name="lowrank-engine",
    version="0.1.0",
    description="Parameter-efficient fine-tuning in pure PyTorch and Triton, with proven 4-bit error bounds",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["lowrank*"]),
    package_data={"": ["py.typed", "*.yaml", "*.jsonl", "*.txt", "*.md", "*.css"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "jinja2",
        "omegaconf>=2.4",
        "rich",
    ],
    extras_require={
        "eval": EVAL,
        "data": DATA,
        "test": ["pytest", "hypothesis", "gguf", *EVAL, *DATA],
        "peers": ["transformers", "peft", "bitsandbytes"],
    },
    entry_points={"console_scripts": ["lowrank=lowrank.cli:main"]},
)
