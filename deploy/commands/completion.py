"""`sluice completion`: what makes a shell complete commands, options and their values.

Left out: what is completed, which click tells from the commands.
"""

from typing import Final

import click
from click.shell_completion import get_completion_class

from runtime.errors import ConfigurationError

#: A start-up file need not have loaded what the script registers with.
_ZSH_BEFORE: Final = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }\n"

#: bash takes a colon for the end of a word, and scopes have one: the parts are put together, and what stands on the
#: line already goes from what is answered.
_BASH_AFTER: Final = r"""
_sluice_completion_whole() {
    local words=() last part prefix
    for part in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        last=$((${#words[@]} - 1))
        if ((last > 0)) && [[ $part == : || ${words[last]} == *: ]]; then
            words[last]+=$part
        else
            words+=("$part")
        fi
    done
    local COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
    _sluice_completion "$1"
    part=${COMP_WORDS[COMP_CWORD]}
    prefix=${part%"${part##*:}"}
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
}

complete -o nosort -F _sluice_completion_whole sluice
"""
_BEFORE: Final = {"zsh": _ZSH_BEFORE}
_AFTER: Final = {"bash": _BASH_AFTER}


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script with which a shell completes commands.

    It belongs into the shell's start-up file, and takes effect in the next shell; `sluice` has to be on the PATH:

    \b
      sluice completion bash >> ~/.bashrc
      sluice completion zsh >> ~/.zshrc
      sluice completion fish > ~/.config/fish/completions/sluice.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise ConfigurationError(f"there is no completion for {shell}")
    command = click.get_current_context().find_root().command
    script = made(command, {}, "sluice", "_SLUICE_COMPLETE").source()
    click.echo(_BEFORE.get(shell, "") + script.strip() + "\n" + _AFTER.get(shell, ""), nl=False)
