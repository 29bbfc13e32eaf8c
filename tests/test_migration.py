"""Databases of earlier versions become ones of this version, with everything in them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

import iiot

VERSIONS = range(1, iiot.SCHEMA_VERSION)


def make_old(path: Path, version: int) -> None:
    """A database as the program of that version left it, with a tenant, a device, its token and a reading."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma foreign_keys = on")
        connection.execute(f"pragma application_id = {iiot.APPLICATION_ID}")
        connection.executescript((Path(__file__).parent / f"schema-{version}.sql").read_text())
        connection.execute("insert into tenant (id, name, created_at) values (1, 'default', 0), (4, 'other', 0)")
        connection.execute("insert into device (id, tenant_id, name, created_at) values (1, 1, 'press-1', 0), (9, 4, 'press-1', 0)")
        connection.execute("insert into presence (device_id, seq) values (1, 7), (9, 8)")
        connection.execute("insert into device_token (id, device_id, secret_hash, created_at) values ('0123456789abcdef', 1, x'00', 0)")
        connection.execute(
            """insert into operator_token (id, tenant_id, name, role, secret_hash, created_at)
               values ('0123456789abcdef', 1, 'shift', 'viewer', x'00', 0)"""
        )
        connection.execute("insert into event (tenant_id, device_id, at, kind, detail) values (1, 1, 0, 'connected', '{}')")
        connection.execute("insert into series values (1, 1, 'pressure')")
        connection.execute("insert into telemetry values (1, 1000, 2.5)")
        if version >= 3:
            connection.execute(
                """insert into audit (tenant_id, at, token, name, role, action, outcome)
                   values (1, 7200000, '0123456789abcdef', 'shift', 'viewer', 'device.remove', 'forbidden'),
                          (null, 0, null, 'root', 'command line', 'tenant.create', 'ok')"""
            )
        connection.execute(f"pragma user_version = {version}")
        connection.commit()


def shape(path: Path) -> dict[str, Any]:
    """Tables with their columns and what refers to what, and the statements that made indexes and triggers."""
    with closing(sqlite3.connect(path)) as connection:
        names = [row[0] for row in connection.execute("select name from sqlite_schema where name not like 'sqlite_%' order by name")]
        columns = {name: sorted(row[1:] for row in connection.execute(f"pragma table_xinfo({name})")) for name in names}
        references = {name: sorted(row[2:] for row in connection.execute(f"pragma foreign_key_list({name})")) for name in names}
        autoincrement = [row[0] for row in connection.execute("select name from sqlite_schema where sql like '%autoincrement%' order by 1")]
        made = connection.execute("select name, sql from sqlite_schema where type in ('index', 'trigger') and sql is not null").fetchall()
        statements = {name: " ".join(sql.split()) for name, sql in made}
        version = connection.execute("pragma user_version").fetchone()
    return {"statements": statements, "columns": columns, "references": references, "autoincrement": autoincrement, "version": version}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_database_becomes_one_like_a_new_one(tmp_path: Path, version: int) -> None:
    make_old(tmp_path / "iiot.db", version)
    iiot.prepare_database(tmp_path / "iiot.db")
    iiot.prepare_database(tmp_path / "new.db")
    assert shape(tmp_path / "iiot.db") == shape(tmp_path / "new.db")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_keeps_every_row_and_what_it_refers_to(tmp_path: Path, version: int) -> None:
    make_old(tmp_path / "iiot.db", version)
    iiot.prepare_database(tmp_path / "iiot.db")
    with closing(iiot.connect(tmp_path / "iiot.db")) as connection:

        def rows(sql: str) -> list[Any]:
            return connection.execute(sql).fetchall()

        assert rows("pragma foreign_key_check") == []
        assert rows("pragma integrity_check") == [("ok",)]
        assert rows("select id, name, devices_most from tenant") == [(1, "default", None), (4, "other", None)]
        assert rows("select id, tenant_id, name, disabled, labels from device") == [(1, 1, "press-1", 0, "{}"), (9, 4, "press-1", 0, "{}")]
        assert rows("select device_id, seq, config_version from presence") == [(1, 7, 0), (9, 8, 0)]
        assert rows("select device_id, pending from device_token") == [(1, 0)]
        assert rows("select name, used_at from operator_token") == [("shift", None)]
        assert rows("select kind from event") == [("connected",)]
        assert rows("select ts, value from telemetry") == [(1000, 2.5)]
        connection.execute("delete from device where id = 9")
        assert rows("select device_id from presence") == [(1,)], "what refers to a table that was put in place of another still does"
        connection.execute("insert into device (tenant_id, name, created_at) values (1, 'press-2', 0)")
        assert rows("select max(id) from device") == [(10,)], "a number is not given out again"


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_happened_before_a_migration_is_found_by_its_time_and_by_who_did_it(tmp_path: Path, version: int) -> None:
    make_old(tmp_path / "iiot.db", version)
    async with iiot.Store.open(tmp_path / "iiot.db", iiot.Limits()) as store:

        async def audit(tenant: int | None, **wanted: Any) -> list[str]:
            everything = iiot.AuditFilter(None, None, None, 0, iiot.LATEST)
            text = await store.read.accounts.audit(tenant, attrs.evolve(everything, **wanted), 10, iiot.INTEGERS - 1)
            return [item["action"] for item in json.loads(text)["items"]]

        removal, creation = (["device.remove"], ["tenant.create"]) if version >= 3 else ([], [])
        assert await audit(1, start=7_200_000, stop=7_200_001) == removal
        assert await audit(1, start=7_200_001) == await audit(1, stop=7_200_000) == []
        assert await audit(None, start=0, stop=1) == await audit(None, actor="root") == creation
        for wanted in ({"actor": "shift"}, {"actor": "0123456789abcdef"}, {"actions": ("device.remove",)}):
            assert await audit(1, **wanted) == removal
        assert '"connected"' in str(await store.read.events(1, "press-1", 10, iiot.LATEST, None, 0, 1))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_keeps_a_copy_of_the_file(tmp_path: Path, version: int) -> None:
    make_old(tmp_path / "iiot.db", version)
    iiot.prepare_database(tmp_path / "iiot.db")
    with closing(sqlite3.connect(tmp_path / f"iiot.db.schema-{version}")) as connection:
        assert connection.execute("select seq from presence").fetchall() == [(7,), (8,)]
        assert connection.execute("pragma user_version").fetchone() == (version,)
