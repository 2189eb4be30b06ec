"""A grpc.aio server over TLS whose one method does nothing: what every RPC costs before the
coordinator does anything.

Started by ops/bench/coordinator; prints its port, then serves until it is ended.
"""

import asyncio
import json
from typing import Any

import grpc

from protos.contract.channel import create_server_identity, server_credentials, server_options
from protos.muster.v1 import leases_pb2


async def release(request: leases_pb2.ReleaseLeasesRequest, context: Any) -> Any:
    """Nothing, at once."""
    return leases_pb2.ReleaseLeasesResponse(num_released_leases=len(request.lease_numbers))


async def main() -> None:
    """Serve."""
    cert_pem, key_pem = create_server_identity(["127.0.0.1"])
    server = grpc.aio.server(options=server_options())
    handler = grpc.unary_unary_rpc_method_handler(
        release,
        request_deserializer=leases_pb2.ReleaseLeasesRequest.FromString,
        response_serializer=leases_pb2.ReleaseLeasesResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler("muster.v1.Leases", {"ReleaseLeases": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(cert_pem, key_pem))
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}", "cert_pem": cert_pem.decode()}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
