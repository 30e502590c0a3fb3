"""The script of `sluice completion` in a real bash, as its start-up file would source it. Left out: zsh and fish."""

import shlex
import subprocess
import sys
from pathlib import Path

from tests.system.roles import clean_environment, sluice

BIN = Path(sys.executable).parent


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words, which it breaks at colons as it does on a line."""
    told = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}"
    asked = "$(complete -p sluice | grep -o '_sluice[a-z_]*') sluice; printf '%s\\n' \"${COMPREPLY[@]}\""
    environment = clean_environment()
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{told}\n{asked}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands_options_and_words_with_colons() -> None:
    script = sluice(clean_environment(), "completion", "bash")
    assert completed(script, "sluice", "sit") == ["site"]
    assert completed(script, "sluice", "site", "create", "--time") == ["--timezone"]
    assert completed(script, "sluice", "key", "create", "x", "--scope", "dev") == ["devices:read", "devices:write"]
    assert completed(script, "sluice", "key", "create", "x", "--scope", "devices", ":") == ["read", "write"]
    assert completed(script, "sluice", "key", "create", "x", "--scope", "devices", ":", "r") == ["read"]
