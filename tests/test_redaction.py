"""No password and no token is shown, stored, or handed to ranks."""

import random
import string
from urllib.parse import quote

import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.config import Settings
from dpsgd_track.launcher.fork_server import Request
from dpsgd_track.launcher.process_group import environment_of
from dpsgd_track.program import without_secrets
from dpsgd_track.redaction import redact_uri, redacted
from dpsgd_track.store.client import one_line
from tests.support.spooled_group import planned

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:s3cr3t@h/db", "postgresql://***@h/db"),
        ("postgresql://u:s3/cr3t@s3cr3t@h/db", "postgresql://***@h/db"),
        ("http://u:s3cr3t?x=1@h:1", "http://***"),
        ("mysql+pymysql://u:s3cr3t#1@h/d?ssl_key=s3cr3t", "mysql+pymysql://***@h/d?ssl_key=***"),
        ("https://h/x?token=s3cr3t&y=1", "https://h/x?token=***&y=1"),
        ("postgresql://h/d?sslpassword=s3cr3t", "postgresql://h/d?sslpassword=***"),
        (
            "postgresql://h/d?user=a@b&password=s3cr3t/@",
            "postgresql://h/d?user=a@b&password=***",
        ),
        ("sqlite:////a@b/x.db", "sqlite:////a@b/x.db"),
        ("http://h:5000/x", "http://h:5000/x"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == redact_uri(shown) == shown
    assert redacted(f"cannot open '{uri}'.") == f"cannot open '{shown}'."
    assert SECRET not in one_line(ValueError(f"no answer from {uri}"))
    assert SECRET not in " ".join(without_secrets(["--tracking-uri", uri, f"--config={uri}"]))


def test_no_password_of_any_characters_is_shown() -> None:
    rng = random.Random(0)
    characters = string.ascii_letters + string.digits + string.punctuation
    for _ in range(3000):
        password = "".join(rng.choices(characters, k=rng.randrange(8, 20)))
        for written in (password, quote(password, safe="")):
            uri = f"postgresql://me:{written}@host:5432/db?sslmode=require"
            shown = redact_uri(uri)
            assert shown in ("postgresql://***@host:5432/db?sslmode=require", "postgresql://***")
            assert redact_uri(f"http://h/x?password={quote(written)}&a=1").endswith("=***&a=1")


@pytest.mark.parametrize("password", ["a/b", "a@b", "a?b", "a#b"])
def test_a_password_that_would_be_taken_for_something_else_is_refused(password: str) -> None:
    uri = f"http://me:{password}@host"
    with pytest.raises(ValueError, match="are written %2F") as raised:
        Settings(tracking_uri=uri)
    assert password not in str(raised.value)
    assert Settings(tracking_uri=f"http://me:{quote(password, safe='')}@host").tracking_uri


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tracking-uri", "postgresql://me:s3/cr3t@s3cr3t@nowhere/db"],
        ["--tracking-uri", "postgresql://nowhere.invalid/db?sslpassword=s3cr3t"],
        ["--tracking-uri=ftp://me:s3cr3t@nowhere/db"],
        ["--no-such-option=http://me:s3cr3t@nowhere"],
        ["http://me:s3cr3t@nowhere"],
    ],
)
def test_no_error_shows_a_secret(arguments, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quick", *arguments], check_inputs=lambda model, data: None) == 2
    said = "".join(capfd.readouterr())
    assert said.count("\n") == 1
    assert "s3" not in said


def test_ranks_get_no_way_into_the_store(monkeypatch) -> None:
    given = {
        "MLFLOW_TRACKING_URI": "postgresql://me:s3cr3t@h/db",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "MLFLOW_TRACKING_TOKEN": SECRET,
        "PGPASSWORD": SECRET,
        "DATABASE_URL": "postgresql://me:s3cr3t@h/db",
    }
    for name, value in {**given, "HTTP_PROXY": "http://me:pw@proxy", "HF_TOKEN": "hf"}.items():
        monkeypatch.setenv(name, value)
    request = Request(job_file="job.json", log="log", num_ranks=2, grace_s=1.0)
    environment = environment_of(planned(), request)
    assert not given.keys() & environment.keys()
    assert SECRET not in "".join(environment.values())
    # These are for models and data.
    assert {"HTTP_PROXY", "HF_TOKEN"} <= environment.keys()
