"""`token create|list|revoke`: join strings."""

from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.options import (
    DEFAULT_DATA_DIR,
    AsJson,
    DataDir,
    RunId,
    parse_duration_seconds,
    print_json,
    print_table,
    time_text,
)
from protos.contract.command_line import say

app = typer.Typer(no_args_is_help=True, help="Join tokens.")


@app.command("create")
def create(
    max_uses: Annotated[
        int, typer.Option("--max-uses", help="New keys that it admits; 0: any number.")
    ] = 0,
    expires: Annotated[str, typer.Option("--expires", help="90s, 30m, 24h, 7d or never.")] = "24h",
    run_id: RunId = "",
    advertise: Annotated[
        str,
        typer.Option(
            "--advertise", help="HOST:PORT in the join string; default: the coordinator's."
        ),
    ] = "",
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Print a join string, which is shown only once."""
    from coordinator.cli.perform import perform
    from coordinator.identity import load_certificate
    from coordinator.operations.requests_admin import CreateTokenRequest
    from protos.contract.channel import JoinString, ca_fingerprint, split_address
    from protos.contract.text import counted

    expire_after_seconds = parse_duration_seconds(expires)
    address = advertise or _running_address(data_dir)
    split_address(address)
    request = CreateTokenRequest(
        run_id=run_id, max_uses=max_uses, expire_after_seconds=expire_after_seconds
    )
    made = perform(data_dir, "create_token", request)
    join_string = JoinString(
        address=address,
        ca_fingerprint=ca_fingerprint(load_certificate(data_dir)),
        run_id=made["run_id"],
        secret=made["secret"],
        expire_unix_seconds=made["expire_unix_seconds"],
    ).encode()
    if is_json:
        shown = {name: value for name, value in made.items() if name != "secret"}
        print_json(shown | {"join_string": join_string})
        return
    typer.echo(join_string)
    uses = (
        "any number of peers"
        if not made["max_uses"]
        else f"at most {counted(made['max_uses'], 'new peer')}"
    )
    say(
        f"token {made['token_id']} for run {made['run_id']}: {uses}, "
        f"until {time_text(made['expire_unix_seconds'])}"
    )


@app.command("list")
def list_tokens(
    run_id: RunId = "", data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False
) -> None:
    """Tokens of a run; secrets are not kept."""
    from coordinator.cli.perform import look
    from coordinator.operations import tokens
    from coordinator.operations.plain import plain_from_response
    from coordinator.operations.requests_admin import ListTokensRequest

    response = look(data_dir, tokens.list_tokens, ListTokensRequest(run_id=run_id))
    if is_json:
        print_json(plain_from_response(response))
        return
    rows = [
        [
            token.token_id,
            token.state,
            f"{token.num_uses} of {token.max_uses or 'any'}",
            time_text(token.create_unix_seconds),
            time_text(token.expire_unix_seconds),
        ]
        for token in response.tokens
    ]
    print_table(["token", "state", "uses", "created", "expires"], rows)


@app.command("revoke")
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="Id that `token list` shows.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Admit nobody else by this token; members that came by it stay."""
    from coordinator.cli.perform import perform
    from coordinator.operations.requests_admin import RevokeTokenRequest

    made = perform(data_dir, "revoke_token", RevokeTokenRequest(token_id=token_id))
    if is_json:
        print_json(made)
        return
    typer.echo(
        f"token {made['token_id']} "
        f"{'is revoked' if made['was_revoked'] else 'had been revoked before'}"
    )


def _running_address(data_dir: Path) -> str:
    from coordinator.cli.perform import require_store
    from coordinator.identity import load_running
    from protos.contract.errors import UnavailableError, UsageError

    require_store(data_dir)
    try:
        return load_running(data_dir).address
    except UnavailableError as error:
        raise UsageError(
            f"no coordinator runs on {data_dir}, so its address is not known",
            allowed="a running coordinator, or the address that it will have",
            remedy="start `muster-coordinator serve`, or pass --advertise HOST:PORT",
        ) from error
