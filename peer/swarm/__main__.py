"""`python -m peer.swarm --channel-fd N --vectors-fd M --num-values K`: the swarm process, started
by the daemon.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Coroutine
from typing import Any

from peer.background import finish
from peer.ipc import AsyncChannel, ChannelClosed
from peer.parent_death import die_with_parent, end_process
from peer.shared_vectors import SharedVectors
from protos.contract.errors import MusterError

logger = logging.getLogger("peer.swarm")

_CLOSE_SECONDS = 3.0
_FAILED_EXIT_CODE = 1


def main() -> int:
    """Run until the daemon says stop, closes the channel, or SIGTERM."""
    parser = argparse.ArgumentParser(prog="peer.swarm")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--vectors-fd", type=int, required=True)
    parser.add_argument("--num-values", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("asyncio").addFilter(_is_news)
    return asyncio.run(_run(arguments))


def _is_news(record: logging.LogRecord) -> bool:
    """False for two things that asyncio logs as errors with a traceback.

    One is the answer to a stream that was cancelled at the end (up to Python 3.11
    StreamReaderProtocol asks a cancelled task for its exception); the other is the lost connection
    to a p2pd that has ended, which hivemind's writer task leaves behind: `_run_while_alive` tells.
    """
    told = (asyncio.CancelledError, ConnectionError)
    return record.exc_info is None or not isinstance(record.exc_info[1], told)


async def _run(arguments: argparse.Namespace) -> int:
    channel = await AsyncChannel.from_socket(socket.socket(fileno=arguments.channel_fd))
    vectors = SharedVectors(arguments.vectors_fd, arguments.num_values)
    work = asyncio.ensure_future(_serve(channel, vectors))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
    try:
        await work
    except (asyncio.CancelledError, ChannelClosed):
        pass
    except MusterError as error:
        _tell_failed(channel, str(error), error.exit_code)
        return error.exit_code
    except Exception as error:  # the daemon learns why, and starts the process again
        logger.exception("the swarm process failed")
        _tell_failed(channel, f"{type(error).__name__}: {error}", _FAILED_EXIT_CODE)
        return _FAILED_EXIT_CODE
    finally:
        await channel.close()
    return 0


def _tell_failed(channel: AsyncChannel, reason: str, exit_code: int) -> None:
    try:
        channel.send("failed", reason=reason, exit_code=exit_code)
    except ChannelClosed:
        logger.warning("%s", reason)


async def _serve(channel: AsyncChannel, vectors: SharedVectors) -> None:
    message = await channel.receive()
    if message["kind"] != "configure":
        return
    from peer.swarm.config_message import SwarmConfig  # late: hivemind takes seconds to import
    from peer.swarm.dht import Dht
    from peer.swarm.node import SwarmNode
    from peer.swarm.old_runs import prune_old_runs
    from peer.swarm.record_file import run_folder_name
    from peer.swarm.transport import Transport

    config = SwarmConfig.from_message(message)
    own_run_folder = run_folder_name(config.run_id, config.coordinator_public_key)
    for done in prune_old_runs(
        config.home, own_run_folder=own_run_folder, now_unix_seconds=time.time()
    ):
        logger.warning("%s", done)
    transport = await Transport.create(
        home=config.home,
        identity_path=config.p2p_key_path,
        prefix=config.dht_prefix,
        host=config.host,
        listen_port=config.listen_port,
        announce=config.announce,
        relays=config.initial_peers,
        upload_limit_mbit=config.upload_limit_mbit,
    )
    try:
        dht = await Dht.create(
            transport,
            dht_prefix=config.dht_prefix,
            initial_peers=config.initial_peers,
            key=config.key,
        )
        node = SwarmNode(
            config=config, channel=channel, vectors=vectors, transport=transport, dht=dht
        )
        await node.start()
        channel.send(
            "ready", p2p_peer_id=transport.p2p_peer_id, addresses=await transport.addresses()
        )
        try:
            await _run_while_alive(node.run(), node.wait_failed(), transport.wait_died())
        finally:
            await asyncio.shield(node.close())
            with contextlib.suppress(
                TimeoutError
            ):  # without p2pd there is nobody to say goodbye to
                await asyncio.wait_for(dht.close(), _CLOSE_SECONDS)
    finally:  # SIGTERM may come while p2pd ends: it is waited for in any case
        await finish(transport.close())


async def _run_while_alive(
    work: Coroutine[Any, Any, None],
    failure: Coroutine[Any, Any, None],
    death: Coroutine[Any, Any, str],
) -> None:
    """Run until the work ends; raises what a task beside it did not foresee, and MusterError as
    soon as p2pd has ended, for the daemon to start both anew.
    """
    working, failing = asyncio.ensure_future(work), asyncio.ensure_future(failure)
    dying = asyncio.ensure_future(death)
    try:
        await asyncio.wait({working, failing, dying}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (working, failing):
            if ended.done():
                await ended
                return
        raise MusterError(
            f"p2pd has ended ({dying.result()})",
            allowed="p2pd lives as long as the swarm process",
            remedy="the swarm process is started again, with a new p2pd",
        )
    finally:
        for task in (working, failing, dying):
            task.cancel()
        await asyncio.gather(working, failing, dying, return_exceptions=True)


if __name__ == "__main__":
    end_process(main())
