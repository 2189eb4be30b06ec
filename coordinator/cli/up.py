"""`muster-coordinator up`: corpus, coordinator, rendezvous and peers on this machine, to a finished
run and its summary.

Order: dataset -> coordinator in this process -> run (new or resumed) -> peers as child processes ->
watch until the run is FINISHED -> evaluate, compare, export and sample through `muster-peer` ->
summary.json. Peers are ordinary peers that joined with a token; one that dies is not started again
(the others go on with its work), unless nobody is left.
"""

import asyncio
import json
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from coordinator.app import Coordinator
from coordinator.cli import end_at_once
from coordinator.cli.up_children import (
    PeerChild,
    check_peer_is_installed,
    run_peer_command,
    run_peer_json,
)
from coordinator.cli.up_run import (
    SUMMARY_FILE,
    RunChoice,
    check_wishes,
    choose_run,
    clear_data_dir,
    prepare_run,
    save_flags,
)
from coordinator.cli.up_summary import Summary, summary_table
from coordinator.cli.up_view import PeerRow, RunView, UpView
from coordinator.config import CoordinatorConfig, load_config
from coordinator.corpus.baselines import compute_baselines
from coordinator.operations.ledger_verify import verify_ledger
from coordinator.operations.membership import peer_exited
from coordinator.operations.plain import plain_from_response
from coordinator.operations.requests import PeerExitedRequest
from coordinator.operations.requests_admin import (
    CreateTokenRequest,
    PeersRequest,
    PeerStatus,
    StatusRequest,
    StatusResponse,
)
from coordinator.operations.requests_ledger import VerifyLedgerRequest
from coordinator.operations.status import peers as read_peers
from coordinator.operations.status import status as read_status
from coordinator.operations.tokens import create_token
from coordinator.ports import require_free
from coordinator.store.data_dir_lock import make_data_dir
from protos.contract.channel import JoinString
from protos.contract.errors import INTERRUPTED_EXIT_CODE, RunFailedError, UsageError
from protos.contract.leaving import LEAVE_SECONDS
from protos.contract.telemetry import RunState

LOOK_SECONDS = 0.5
HEARTBEAT_SECONDS = 2.0
"""On loopback a heartbeat costs nothing, and everything is noticed sooner."""
LEASE_TTL_SECONDS = 20.0
MAX_RESTARTS = 3
PROMPT = "def "
_MAX_PEERS = 64
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """Flags of `up`; None means not given."""

    num_peers: int = 3
    budget_tokens: int | None = None
    model: str | None = None
    settings: tuple[str, ...] = ()
    corpus: tuple[str, ...] = ()
    seed: int | None = None
    data_dir: Path = Path("muster-data")
    port: int | None = None
    is_kept_serving: bool = False
    is_fresh: bool = False
    is_json: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_peers <= _MAX_PEERS:
            raise UsageError(
                f"--peers {self.num_peers}",
                allowed=f"1 to {_MAX_PEERS} peers on one machine",
                remedy="for more, run `muster-coordinator serve` and join from several machines",
            )
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise UsageError(
                f"--budget-tokens {self.budget_tokens}",
                allowed="a number of tokens from one window (model.seq_len) up",
                remedy="name a larger budget, or leave it out",
            )


def run_up(options: UpOptions) -> int:
    """Run to the end and return the exit code. Raises MusterError; an interrupt leaves a run that
    `up` resumes.
    """
    return asyncio.run(_Up(options).run())


class _Up:
    def __init__(self, options: UpOptions) -> None:
        self._options = options
        self._view = UpView()
        self._peers: list[PeerChild] = []
        self._stop = asyncio.Event()
        self._is_preparing = True
        self._num_restarts = 0
        self._join_string = ""
        self._run_id = ""

    async def run(self) -> int:
        """Everything, from the data directory to the exit code."""
        options = self._options
        self._install_signals()
        check_wishes(
            model=options.model,
            settings=options.settings,
            budget_tokens=options.budget_tokens,
            seed=options.seed,
        )
        config = _config(options)
        if options.port:
            require_free(config.host, options.port, what="the coordinator", flag="--port")
        check_peer_is_installed()
        make_data_dir(options.data_dir)
        if options.is_fresh:
            clear_data_dir(options.data_dir)
        choice = choose_run(options.data_dir, _given_flags(options))
        with self._view:
            self._say_choice(choice)
            prepared = await asyncio.to_thread(
                prepare_run,
                choice,
                data_dir=options.data_dir,
                sources=options.corpus,
                model=options.model,
                settings=options.settings,
                budget_tokens=options.budget_tokens,
                seed=options.seed,
                num_peers=options.num_peers,
                say=self._view.say,
            )
            coordinator = Coordinator(config)
            await coordinator.start()
            try:
                self._is_preparing = False
                if not choice.run_id:
                    save_flags(options.data_dir, _given_flags(options))
                self._run_id = choice.run_id or await prepared.create(coordinator)
                self._view.say(f"page: {coordinator.http_address}")
                if not choice.is_trained:
                    await self._train(coordinator)
                return await self._finish(coordinator, prepared.dataset_dir)
            finally:
                await self._stop_peers()
                await coordinator.stop()

    def _say_choice(self, choice: RunChoice) -> None:
        if choice.run_id:
            self._view.say(
                f"resuming run {choice.run_id} in {self._options.data_dir}: {choice.reason}"
            )

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for caught in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(caught, self._on_signal)

    def _on_signal(self) -> None:
        self._view.stop_live()
        if self._is_preparing:
            self._view.say("interrupted while preparing; the same command prepares anew")
            self._end_now()
        if self._stop.is_set():
            self._end_now()
        self._view.say(
            "stopping; `up` with the same --data-dir resumes this run (again: stop at once)"
        )
        self._stop.set()

    def _end_now(self) -> NoReturn:
        """At once: a thread may be building the corpus for minutes."""
        for peer in self._peers:
            if not peer.has_ended:
                peer.process.kill()
        end_at_once()

    async def _train(self, coordinator: Coordinator) -> None:
        """Peers, until the run is over and they have left, or somebody interrupts."""
        await self._start_peers(coordinator)
        await self._watch(coordinator)
        await self._unless_stopped(self._wait_for_peers())
        self._view.stop_live()

    async def _finish(self, coordinator: Coordinator, dataset_dir: Path) -> int:
        """Results of a finished run; the exit code."""
        options = self._options
        summary = await self._unless_stopped(self._summarise(coordinator, dataset_dir))
        if summary is None:
            return INTERRUPTED_EXIT_CODE
        path = options.data_dir / SUMMARY_FILE
        path.write_text(summary.to_json() + "\n")
        self._view.say(summary_table(summary))
        self._view.say(
            f"summary: {path}\ncheckpoint: "
            f"{summary.checkpoint_path}\n"
            + (summary.not_exported_reason or f"sample:\n{summary.sample_text}")
        )
        if options.is_json:
            sys.stdout.write(summary.to_json() + "\n")
            sys.stdout.flush()
        if options.is_kept_serving:
            self._view.say(
                f"serving {coordinator.http_address} and {coordinator.address} until interrupted"
            )
            await self._stop.wait()
        return 0

    async def _unless_stopped(self, work: Coroutine[None, None, _Result]) -> _Result | None:
        """Result of `work`, or None as soon as somebody interrupts."""
        if self._stop.is_set():
            work.close()
            return None
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() and not self._stop.is_set() else None
        finally:
            for future in (task, stopped):
                future.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    # Peers.

    async def _start_peers(self, coordinator: Coordinator) -> None:
        token = await coordinator.perform(create_token, CreateTokenRequest(run_id=self._run_id))
        self._join_string = JoinString(
            address=coordinator.local_address,
            ca_fingerprint=coordinator.ca_fingerprint,
            run_id=self._run_id,
            secret=token.secret.hex(),
            expire_unix_seconds=token.expire_unix_seconds,
        ).encode()
        for index in range(self._options.num_peers):
            name = f"peer-{index + 1}"
            self._peers.append(await self._start_peer(name))

    async def _start_peer(self, name: str) -> PeerChild:
        return await PeerChild.start(
            name=name,
            home=self._home_of(name),
            join_string=self._join_string,
            num_threads=1,
            step_cache=self._step_cache,
        )

    def _home_of(self, name: str) -> Path:
        return (self._options.data_dir / "peers" / name).absolute()

    @property
    def _step_cache(self) -> Path:
        """Kernels and step plan, made once for all peers and the one-process comparison."""
        return (self._options.data_dir / "step").absolute()

    async def _wait_for_peers(self) -> None:
        """Peers leave by themselves once they hear that the run is over."""
        waits = [asyncio.ensure_future(peer.process.wait()) for peer in self._peers]
        try:
            await asyncio.wait(waits, timeout=HEARTBEAT_SECONDS + LEAVE_SECONDS)
        finally:
            for wait in waits:
                wait.cancel()
        await self._stop_peers()

    async def _stop_peers(self) -> None:
        await asyncio.gather(*(peer.stop() for peer in self._peers))

    async def _look_after_peers(self, coordinator: Coordinator) -> None:
        """Tell the coordinator of every peer that ended; start all again when nobody is left."""
        for peer in self._peers:
            if peer.has_ended and not peer.is_reported:
                peer.is_reported = True
                reason = (
                    f"its process ended with code {peer.process.returncode}: {peer.last_line()}"
                )
                self._view.say(f"peer {peer.name}: {reason}")
                peer_id = peer.peer_id()
                if peer_id is not None:
                    request = PeerExitedRequest(run_id=self._run_id, peer_id=peer_id, reason=reason)
                    await coordinator.perform(peer_exited, request)
        if not all(peer.has_ended for peer in self._peers):
            return
        if self._num_restarts == MAX_RESTARTS:
            raise RunFailedError(
                f"all {len(self._peers)} peers ended {MAX_RESTARTS + 1} times; last words of "
                f"{self._peers[0].name}: {self._peers[0].last_line()}",
                allowed=f"peers that last, started at most {MAX_RESTARTS + 1} times",
                remedy=f"read {self._peers[0].home}/logs, then run `up` again to resume",
            )
        self._num_restarts += 1
        self._view.say(
            f"no peer is left; starting all again ({self._num_restarts} of at most {MAX_RESTARTS} "
            "times)"
        )
        self._peers = [await self._start_peer(peer.name) for peer in self._peers]

    # Watching.

    async def _watch(self, coordinator: Coordinator) -> None:
        """Show the run until it is over or somebody interrupts."""
        while not self._stop.is_set():
            status = await self._status(coordinator)
            rows = await coordinator.look(read_peers, PeersRequest(run_id=self._run_id))
            view = _view_from(
                status, tuple(_peer_row(peer) for peer in rows.peers), coordinator.http_address
            )
            self._view.show(view, now_monotonic_seconds=time.monotonic())
            if status.state == RunState.FINISHED:
                return
            if status.state == RunState.STOPPED:
                raise RunFailedError(
                    f"the run was stopped: {status.state_reason}",
                    allowed="a run that goes on; a stopped one is at its end",
                    remedy="start anew with --fresh",
                )
            await self._look_after_peers(coordinator)
            try:
                await asyncio.wait_for(self._stop.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    async def _status(self, coordinator: Coordinator) -> StatusResponse:
        return await coordinator.look(read_status, StatusRequest(run_id=self._run_id))

    # Results.

    async def _summarise(self, coordinator: Coordinator, dataset_dir: Path) -> Summary:
        options, say = self._options, self._view.say
        status = await self._status(coordinator)
        verdict = await coordinator.look(verify_ledger, VerifyLedgerRequest(run_id=self._run_id))
        state_path = (options.data_dir / status.newest_checkpoint_path).absolute()
        spec_path = (options.data_dir / "run_spec.json").absolute()
        say("evaluating the final state on all held-out text")
        evaluation = await run_peer_json(
            "eval", str(state_path), "--dataset", str(dataset_dir), "--json"
        )
        say(f"training one process on the same {status.credited_tokens:,} tokens for comparison")
        reference = await run_peer_json(
            "reference", "--spec", str(spec_path), "--dataset", str(dataset_dir),
            "--num-tokens", str(status.schedule_tokens), "--eval-tokens", "0", "--threads", "2",
            "--home", str(self._home_of("peer-1")), "--step-cache", str(self._step_cache), "--json",
        )  # fmt: skip
        baselines = await asyncio.to_thread(compute_baselines, dataset_dir)
        export_path, sample, reason = str(state_path), "", why_not_exported(evaluation["objective"])
        if reason:
            say(reason)
        else:
            export_path, sample = await self._export_and_sample(status, state_path, dataset_dir)
        first = status.first_evaluation
        return Summary(
            run_digest=status.run_digest,
            num_peers_seen=status.num_peers_seen,
            outer_steps_committed=status.outer_steps_committed,
            credited_tokens=status.credited_tokens,
            budget_tokens=status.budget_tokens,
            uncredited_trained_tokens=status.uncredited_trained_tokens,
            rolled_back_tokens=status.rolled_back_tokens,
            heldout_loss_nats_first=float("nan") if first is None else first.loss_nats,
            heldout_loss_nats_last=_number(evaluation["loss_nats"]),
            heldout_bits_per_byte_last=_number(evaluation["bits_per_byte"]),
            one_process_bits_per_byte=_number(reference["heldout_bits_per_byte"]),
            gzip_bits_per_byte=baselines.gzip_bits_per_byte,
            bigram_bits_per_byte=baselines.bigram_bits_per_byte,
            train_seconds=status.train_seconds,
            goodput_tokens_per_second=status.mean_goodput_tokens_per_second,
            credited_tokens_by_peer=named_tokens(
                status.credited_tokens_by_peer, status.name_by_peer
            ),
            state_digests_equal=status.state_digests_equal,
            ledger_violations=list(verdict.violations),
            checkpoint_path=export_path,
            sample_text=sample,
            not_exported_reason=reason,
        )

    async def _export_and_sample(
        self, status: StatusResponse, state_path: Path, dataset_dir: Path
    ) -> tuple[str, str]:
        """(exported folder, text that goes on from PROMPT)."""
        export_dir = (self._options.data_dir / "export").absolute()
        shutil.rmtree(export_dir, ignore_errors=True)
        credits_path = self._options.data_dir.absolute() / "credits.json"
        credits_path.write_text(json.dumps(plain_from_response(status)))
        await run_peer_command(
            "export", str(state_path), str(export_dir), "--dataset", str(dataset_dir),
            "--credits", str(credits_path),
        )  # fmt: skip
        sample = await run_peer_command(
            "generate", str(state_path), PROMPT, "--dataset", str(dataset_dir),
            "--max-tokens", "64", "--seed", "0",
        )  # fmt: skip
        return str(export_dir), sample.decode(errors="replace")


def why_not_exported(objective: str) -> str:
    """Why a run of this objective ends without an export and a sample; empty if it has both."""
    if objective == "causal":
        return ""
    return (
        f"the objective is {objective}: no export, for LlamaForCausalLM attends causally, and no "
        "sample; the state file works with `muster-peer eval`"
    )


def _number(value: float | None) -> float:
    """A figure of `muster-peer`, which says null for what is not finite."""
    return float("nan") if value is None else float(value)


def named_tokens(
    tokens_by_peer: Mapping[str, int], name_by_peer: Mapping[str, str]
) -> dict[str, int]:
    """Tokens by name; peers that share a name have their id behind it."""
    num_by_name = Counter(name_by_peer.get(peer_id, peer_id) for peer_id in tokens_by_peer)
    named = {}
    for peer_id, tokens in tokens_by_peer.items():
        name = name_by_peer.get(peer_id, peer_id)
        named[name if num_by_name[name] == 1 else f"{name} ({peer_id})"] = tokens
    return named


def _given_flags(options: UpOptions) -> dict[str, object]:
    """Flags of this call that say what is trained."""
    given = {
        "--budget-tokens": options.budget_tokens,
        "--model": options.model,
        "--set": list(options.settings) or None,
        "--corpus": list(options.corpus) or None,
        "--seed": options.seed,
    }
    return {flag: value for flag, value in given.items() if value is not None}


def _config(options: UpOptions) -> CoordinatorConfig:
    return load_config(
        flags={
            "data_dir": options.data_dir,
            "host": "127.0.0.1",
            "port": 0 if options.port is None else options.port,
            "http_port": 0,
            "rendezvous_port": 0,
            "heartbeat_interval_seconds": HEARTBEAT_SECONDS,
            "lease_ttl_seconds": LEASE_TTL_SECONDS,
        }
    )


def _peer_row(peer: PeerStatus) -> PeerRow:
    is_live = peer.is_live and bool(peer.claims.state)
    return PeerRow(
        name=peer.name or peer.peer_id[:8],
        state=peer.claims.state if is_live else peer.state,
        reason=peer.claims.state_reason if is_live else peer.state_reason,
        outer_step=peer.attested_outer_step,
        tokens_per_second=peer.claims.tokens_per_second if is_live else 0.0,
        credited_tokens=peer.credited_tokens,
    )


def _view_from(status: StatusResponse, peers: Sequence[PeerRow], page_url: str) -> RunView:
    last = status.last_evaluation
    return RunView(
        run_state=status.state,
        run_reason=status.state_reason,
        credited_tokens=status.credited_tokens,
        budget_tokens=status.budget_tokens,
        goodput_tokens_per_second=status.goodput_tokens_per_second,
        outer_steps=status.outer_step,
        loss_nats=status.train_loss_nats or None,
        heldout_bits_per_byte=last.bits_per_byte
        if last is not None and last.bits_per_byte
        else None,
        eta_seconds=status.eta_seconds if status.eta_seconds >= 0 else None,
        page_url=page_url,
        peers=tuple(peers),
    )
