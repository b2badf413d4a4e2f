"""Servers and clients that leave nothing behind."""

from __future__ import annotations

import os

import pytest

from tests.harness.qmp_server import RawClient, ServerThread


@pytest.fixture
def serve(tmp_path):
    """Starts servers; checks at the end that they leave no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    servers, clients = [], []

    def start(**options):
        servers.append(ServerThread(tmp_path / f"qmp{len(servers)}", **options))
        return servers[-1]

    def connect(server, **options):
        clients.append(RawClient(server.path, **options))
        return clients[-1]

    start.connect = connect
    yield start
    for client in clients:
        client.close()
    for server in servers:
        server.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def client(serve, server):
    return serve.connect(server)
