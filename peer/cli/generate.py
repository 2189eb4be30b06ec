"""`muster-peer generate`: go on from prompts, streamed to the terminal."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer.cli.options import (
    AsJson,
    Checkpoint,
    DatasetDir,
    SpecPath,
    Threads,
    print_json,
    print_line,
    print_part,
    require_effect,
)
from protos.contract.command_line import say

if TYPE_CHECKING:
    from peer.cli.checkpoints import OpenedCheckpoint
    from peer.eval.generate import NewToken, Sampling

_UNFINISHED = "\ufffd"


def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to go on from.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with a prompt on each line.", readable=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token always.", min=0.0)
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0: all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest share.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Same seed, same text; the second prompt has the next.", min=0)
    ] = 0,
    has_cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep keys and values of earlier tokens.")
    ] = True,
    spec: SpecPath = None,
    dataset: DatasetDir = None,
    threads: Threads = 0,
    is_json: AsJson = False,
) -> None:
    """Go on from one or more prompts; one prompt is shown as it grows."""
    from peer.cli.checkpoints import open_checkpoint, set_up_torch

    if temperature == 0:
        require_effect(
            {"--top-k": top_k > 0, "--top-p": top_p < 1, "--seed": seed > 0},
            without="with --temperature 0, which always takes the likeliest token",
            remedy="leave them out, or raise --temperature",
        )
    set_up_torch(threads)
    from peer.eval.generate import Sampling

    texts = _read_prompts(prompts or [], prompt_file)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    opened = open_checkpoint(checkpoint, spec_path=spec, dataset=dataset)
    run = _Generation(opened, texts, sampling=sampling, has_cache=has_cache, max_tokens=max_tokens)
    is_streamed = len(texts) == 1 and not is_json
    if is_streamed:
        print_part(texts[0])
    for text in run.pieces():
        if is_streamed:
            print_part(text)
    if is_streamed:
        print_line("")
    elif not is_json:
        for sample in run.samples():
            print_line(f"--- {sample['prompt']!r}")
            print_line(sample["text"])
    if is_json:
        plain: dict[str, Any] = {"samples": run.samples()}
        if len(texts) == 1:
            plain |= run.samples()[0]
        print_json(plain | run.figures | opened.provenance)
    else:
        say(
            f"{run.num_tokens} tokens in {run.seconds:.2f} s: {run.tokens_per_second:.1f} tokens/s"
            + ("" if has_cache else ", without a cache")
        )


class GrowingText:
    """Text of tokens as they come, whose pieces together are the text of all tokens: these are
    decoded together each time, for a word alone may look different (Metaspace).
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, token: int) -> str:
        """What is certain now and was not before; empty within a character."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if text.endswith(_UNFINISHED):
            return ""
        piece, self._num_shown = text[self._num_shown :], len(text)
        return piece

    def end(self) -> str:
        """The rest."""
        return self._decode(self._tokens)[self._num_shown :]


class _Generation:
    """Texts that grow."""

    def __init__(
        self,
        opened: "OpenedCheckpoint",
        prompts: list[str],
        *,
        sampling: "Sampling",
        has_cache: bool,
        max_tokens: int,
    ) -> None:
        opened.require_next_token(
            "prefix", purpose="generating goes on from a prompt, token by token"
        )
        self._opened, self._prompts, self._sampling = opened, prompts, sampling
        self._has_cache, self._max_tokens = has_cache, max_tokens
        self._tokenizer = opened.load_tokenizer()
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self.num_tokens = 0
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts by the time that prompts and tokens took, loading left out."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def figures(self) -> dict[str, Any]:
        """How much and how fast."""
        return {
            "num_generated_tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "has_cache": self._has_cache,
        }

    def pieces(self) -> Iterator[str]:
        """Text of the first prompt in pieces of whole characters; runs the generation."""
        growing = GrowingText(self._tokenizer.decode)
        for new in self._run():
            self._tokens[new.row].append(new.token)
            if new.row == 0:
                yield growing.add(new.token)
        yield growing.end()

    def _run(self) -> "Iterator[NewToken]":
        from peer.eval.generate import generate_batch

        opened = self._opened
        model = opened.build_model()
        begin = time.monotonic()
        for new in generate_batch(
            model,
            [opened.prompt_tokens(self._tokenizer, prompt) for prompt in self._prompts],
            max_new_tokens=self._max_tokens,
            sampling=self._sampling,
            eos_token_id=opened.eos_token_id,
            is_prompt_prefix=opened.objective_name == "prefix",
            has_cache=self._has_cache,
        ):
            self.num_tokens += 1
            self.seconds = time.monotonic() - begin
            yield new

    def samples(self) -> list[dict[str, Any]]:
        """Results in the order of the prompts."""
        from peer.eval.generate import MAX_SEED

        return [
            {
                "prompt": prompt,
                "text": prompt + self._tokenizer.decode(tokens),
                "num_new_tokens": len(tokens),
                "seed": (self._sampling.seed + index) % MAX_SEED,
            }
            for index, (prompt, tokens) in enumerate(zip(self._prompts, self._tokens, strict=True))
        ]


def _read_prompts(prompts: list[str], path: Path | None) -> list[str]:
    """Prompts of the arguments and of the file. Raises UsageError."""
    from protos.contract.errors import UsageError

    if path is not None:
        try:
            lines = [line.removesuffix("\r") for line in path.read_bytes().decode().split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--prompts {path} cannot be read: {error}",
                allowed="a UTF-8 text file with a prompt on each line",
                remedy="check the path",
            ) from error
        prompts = [*prompts, *filter(None, lines)]
    if not prompts:
        raise UsageError(
            "no prompt",
            allowed="one or more texts, or --prompts FILE with a prompt on each line",
            remedy='name one; "" goes on from nothing',
        )
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt {prompt!r} is not UTF-8",
                allowed="text in UTF-8",
                remedy="convert it, for example with iconv",
            ) from error
    return prompts
