"""Scripts that let a shell complete nbdimg's command line, made from the verbs' own parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_BASH = """\
_nbdimg() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
    if (( COMP_CWORD == 1 )); then
        words="{verbs} --help --version --completion"
    else
        case "${{COMP_WORDS[1]}}:$previous" in
{choices}
            *) case "${{COMP_WORDS[1]}}" in
{options}
            esac
            [[ $word == -* ]] || words= ;;
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
    [[ -n $words ]] || compopt -o default
}}
complete -F _nbdimg nbdimg
"""

_FORMATS = ("qcow2", "raw", "vpc", "vhdx", "vdi", "vmdk")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What is to be evaluated by bash or, in its bash-compatible mode, by zsh."""
    verbs = dict(_verbs(parser))
    options = [
        f"                {verb}) words='{' '.join(_options(verb_parser))}' ;;" for verb, verb_parser in verbs.items()
    ]
    choices = [
        f"            {'|'.join(f'{verb}:{name}' for name in action.option_strings)}) words='{' '.join(values)}' ;;"
        for verb, verb_parser in verbs.items()
        for action in verb_parser._actions
        if action.option_strings and (values := _values(action))
    ]
    text = _BASH.format(verbs=" ".join(verbs), choices="\n".join(choices), options="\n".join(options))
    return "autoload -U +X bashcompinit && bashcompinit\n" + text if shell == "zsh" else text


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings


def _values(action: argparse.Action) -> tuple[str, ...]:
    """What may follow an option, where that is known."""
    if action.choices:
        return tuple(map(str, action.choices))
    return _FORMATS if action.metavar == "FMT" else ()
