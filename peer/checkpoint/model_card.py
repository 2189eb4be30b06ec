"""The README.md of an exported model: what it is, what it was trained on, and who trained it.

Pure. A peer is named only where the operator passes a name that its owner has agreed to; everybody
else is the beginning of a key's digest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.contract.chunk_format import Manifest
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec, RunSpec

NO_LICENCE = "not stated"
_SHOWN_ID = 12
_GENERATING = (
    "`transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`, or `muster-peer generate FOLDER "
    "PROMPT`. Documents begin and end with the end-of-document token."
)
_CLASSIFYING = (
    "`transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)`. Put the "
    "end-of-document token before a text, as in training; it pads, too. The classes are in "
    "config.json (`id2label`)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What one peer was credited for."""

    who: str
    """A name by consent, or the beginning of the peer's id."""
    tokens: int


def credits_from_status(
    plain: Any, *, run_digest: str, consenting: Mapping[str, str]
) -> tuple[Credit, ...]:
    """Credits out of `muster-coordinator status --json`, most first; `consenting` maps beginnings
    of peer ids to names. Raises UsageError for a status of another run or an unknown peer.
    """
    try:
        found_digest = str(plain["run_digest"])
        tokens_by_peer = {str(p): int(n) for p, n in plain["credited_tokens_by_peer"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"no credits in the file ({error!r})",
            allowed="what `muster-coordinator status --json` prints",
            remedy="write it again",
        ) from error
    if found_digest != run_digest:
        raise UsageError(
            f"credits of the run {found_digest[:16]}...",
            allowed=f"those of the checkpoint's run, {run_digest[:16]}...",
            remedy="ask that run's: `muster-coordinator status --run ID --json`",
        )
    name_by_peer: dict[str, str] = {}
    for prefix, name in consenting.items():
        matching = [peer for peer in tokens_by_peer if peer.startswith(prefix)]
        if len(matching) != 1:
            raise UsageError(
                f"{len(matching)} credited peers begin with {prefix!r}",
                allowed="an unmistakable beginning of a credited peer's id",
                remedy="take it from `muster-coordinator peers`",
            )
        name_by_peer[matching[0]] = name
    ordered = sorted(tokens_by_peer.items(), key=lambda item: (-item[1], item[0]))
    return tuple(
        Credit(who=name_by_peer.get(peer, peer[:_SHOWN_ID]), tokens=tokens)
        for peer, tokens in ordered
    )


def model_card(
    model: ModelSpec,
    *,
    run_spec: RunSpec | None,
    provenance: Mapping[str, Any],
    manifest: Manifest | None,
    credits: tuple[Credit, ...] = (),
    licence: str = NO_LICENCE,
    is_classifier: bool = False,
) -> str:
    """The card's text, with the front matter that model hubs read. Raises UsageError for a licence
    that is no single line.
    """
    if not licence.strip() or not licence.isprintable():
        raise UsageError(
            f"--licence {licence!r}",
            allowed="one line, such as apache-2.0",
            remedy="name it, or leave the option out",
        )
    shape = ModelShape.from_spec(model)
    lines = [
        "---",
        "library_name: transformers",
        f"license: {licence if licence != NO_LICENCE else 'other'}",
        "tags: [muster]",
        "---",
        "# A language model trained with Muster",
        "",
        f"Llama-family decoder, {shape.num_parameters:,} parameters, {model.num_layers} layers of "
        f"width {model.d_model}, vocabulary {model.vocab_size:,}, context {model.seq_len} tokens.",
        "",
        f"Licence of the weights: {licence}.",
        "",
        "## Where it comes from",
        "",
    ]
    lines += [f"- {key}: `{value}`" for key, value in provenance.items() if value != ""]
    if run_spec is not None:
        lines += [f"- dataset (digest of its manifest): `{run_spec.data.dataset_id}`"]
        lines += [f"- objective: {run_spec.objective.name}; seed {run_spec.seed}"]
        if run_spec.initial_digest:
            lines += [f"- went on from an imported model: `{run_spec.initial_digest}`"]
    if manifest is not None:
        lines += ["", "## Data", "", "| source | tokens | licence |", "|---|---|---|"]
        lines += [
            f"| {source.name} | {source.num_tokens:,} | {source.licence or NO_LICENCE} |"
            for source in manifest.sources
        ]
    if credits:
        lines += [
            "",
            "## Who trained it",
            "",
            "Tokens credited by certificates of the swarm; names with their owners' consent.",
            "",
            "| peer | credited tokens |",
            "|---|---|",
        ]
        lines += [f"| {credit.who} | {credit.tokens:,} |" for credit in credits]
        lines += [f"| all | {sum(credit.tokens for credit in credits):,} |"]
    return "\n".join([*lines, "", "## Use", "", _CLASSIFYING if is_classifier else _GENERATING, ""])
