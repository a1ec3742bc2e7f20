"""What a run reads: the bundled domain or a file of records, rendered into examples, in one stream."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank.data.batches import Batch, collate
from lowrank.data.config import DataConfig
from lowrank.data.knowledge import Knowledge, read_knowledge
from lowrank.data.questions import Domain, bundled, domain
from lowrank.data.records import Record, read_records
from lowrank.data.render import Example, Renderer
from lowrank.data.templates import BUNDLED as BUNDLED_WORDINGS
from lowrank.data.templates import read_templates
from lowrank.errors import ConfigError, did_you_mean

BUNDLED = ("labtests", "labtests-quick")


@dataclass(frozen=True)
class Material:
    """Records by use. `test` has a truth evaluation's parts for a domain, {"qa": ...} for a file with validation."""

    name: str
    train: list[Record]
    validation: list[Record]
    test: dict[str, list[Record]]
    general: list[Record] = field(default_factory=list)
    knowledge: Knowledge | None = None
    prose: str = ""
    notice: str = ""
    own_general: int = 0
    """General records that the user's own file brings."""


def read_material(config: DataConfig, seed: int, split: str = "test") -> Material:
    """The records that `data.path` names; `split` of a domain's held-out questions becomes `test`. ConfigError where
    the path is neither a bundled domain nor a file."""
    if config.validation is not None and (config.templates is not None or config.path in BUNDLED):
        raise ConfigError(
            f"data.validation is for a file of records; {config.path!r} brings its own held-out questions"
        )
    if config.templates is not None:
        knowledge = read_knowledge(config.path)
        knowledge = knowledge if config.subjects is None else knowledge.subset(config.subjects)
        source = domain(
            Path(config.path).stem,
            knowledge,
            read_templates(BUNDLED_WORDINGS if config.templates == "labtests" else config.templates),
        )
        return _of_domain(source, config, seed, split)
    if config.path in BUNDLED:
        return _of_domain(bundled(config.path, config.subjects), config, seed, split)
    if not Path(config.path).is_file():
        near = did_you_mean(config.path, BUNDLED)
        raise ConfigError(
            f"data.path {config.path!r} is no file and no bundled domain{near}; bundled: {', '.join(BUNDLED)}"
        )
    held = read_records(config.validation) if config.validation else []
    records = read_records(config.path)
    base = bundled("labtests")  # its general questions and prose serve any domain
    own = [record for record in records if record.kind == "general"]
    return Material(
        name=Path(config.path).stem,
        train=[record for record in records if record.kind != "general"],
        validation=held,
        test={"qa": held} if held else {},
        general=own or [item.record() for item in base.general if not item.held_out],
        prose=base.prose,
        own_general=len(own),
    )


def _of_domain(source: Domain, config: DataConfig, seed: int, split: str) -> Material:
    sizes = {name: getattr(config, name) for name in ("plain_per_fact", "traps_per_fact", "confirms_per_fact")}
    questions = source.build(seed, **sizes)
    parts = [part for name, part in questions.validation.items() if name not in ("general", "answerable")]
    return Material(
        name=source.name,
        train=[record for record in questions.train if record.kind != "general"],
        validation=[record for part in parts for record in part],
        test=questions.test if split == "test" else questions.validation,
        general=[record for record in questions.train if record.kind == "general"],
        knowledge=source.knowledge,
        prose=source.prose,
        notice=source.notice,
    )


@dataclass(frozen=True)
class Examples:
    train: list[Example]
    general: list[Example]
    validation: list[Example]
    cut: int
    """How many were longer than data.max_length and lost their end."""


def render(material: Material, renderer: Renderer, with_general: bool) -> Examples:
    train = [renderer.example(record) for record in material.train]
    general = [renderer.example(record) for record in material.general] if with_general else []
    validation = [renderer.example(record) for record in material.validation]
    if not train:
        raise ConfigError(f"{material.name} holds nothing to train on")
    full = renderer.max_length
    cut = sum(
        len(example.input_ids) == full and example.input_ids[-1] not in renderer.tokenizer.eos_ids for example in train
    )
    return Examples(train, general, validation, cut)


def validation_batches(examples: Sequence[Example], batch_size: int, pad_id: int, limit: int) -> list[Batch]:
    """At most `limit` examples, evenly spread over what there is, in batches of alike lengths."""
    step = max(1, -(-len(examples) // limit))
    chosen = sorted(examples[::step], key=lambda example: len(example.input_ids))
    return [collate(chosen[i : i + batch_size], pad_id) for i in range(0, len(chosen), batch_size)]
