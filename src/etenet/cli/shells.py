"""`etenet completion`: what bash and zsh need to complete `etenet`, made from the parser of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

# zsh runs it by bashcompinit. There `compgen -f` would not follow `~`, so the shells complete files themselves.
_SCRIPT = """\
# Completion of {program} for bash and zsh: eval "$({program} completion)"
if [ -n "${{ZSH_VERSION-}}" ]; then
    autoload -Uz compinit bashcompinit
    (( $+functions[compdef] )) || compinit -u
    bashcompinit
fi
_{program}() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    case "${{COMP_WORDS[1]}} $before" in
{choices}
        *) case "$word" in
            -*) case "${{COMP_WORDS[1]}}" in
{options}
            esac ;;
            *) [ "$COMP_CWORD" -ne 1 ] || words="{commands}" ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _{program} {program}
"""


def script(parser: argparse.ArgumentParser) -> str:
    """A script for bash and zsh that completes commands, options and their choices, and files everywhere else."""
    commands = _subcommands(parser)
    choices = [
        f'        "{name} {flag}") words="{" ".join(map(str, action.choices))}" ;;'
        for name, command in commands.items()
        for flag, action in _options(command)
        if action.choices
    ]
    options = [
        f'                {name}) words="{" ".join(flag for flag, _ in _options(command))}" ;;'
        for name, command in commands.items()
    ]
    return _SCRIPT.format(
        program=parser.prog,
        commands=" ".join(commands),
        choices="\n".join(choices),
        options="\n".join(
            [*options, f'                *) words="{" ".join(flag for flag, _ in _options(parser))}" ;;']
        ),
    )


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        for flag in action.option_strings:
            yield flag, action
