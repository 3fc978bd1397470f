"""``ditscale completion bash``: print a script by which a shell completes jobs, settings and choices.

The script contains all candidates, so completion does not start Python.
"""

import shlex

from launch.command.app import valid_names
from launch.command.help import options_of

SHELLS = ("bash", "zsh")

_SCRIPT = """# Made by `ditscale completion {shell}`; make it again after an update.
{zsh}_ditscale() {{
    local word job
    word="${{COMP_LINE:0:COMP_POINT}}"
    word="${{word##* }}"
    job="${{COMP_WORDS[1]}}"
    local candidates=""
    if [ "$COMP_CWORD" -le 1 ]; then
        candidates={jobs}
    else
        case "$job" in
{cases}
        esac
    fi
    COMPREPLY=()
    case "$word" in
        *=*)
            local rest="${{word#*=}}"
            COMPREPLY=($(compgen -W "$candidates" -- "$word"))
            if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=($(compgen -f -- "$rest")); else
                COMPREPLY=("${{COMPREPLY[@]#*=}}"); fi ;;
        *) COMPREPLY=($(compgen -W "$candidates" -- "$word")) ;;
    esac
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -F _ditscale ditscale
"""


def script(shell: str, jobs: list[str]) -> str:
    """Return the script for a shell."""
    cases = []
    for job in jobs:
        settings, groups = valid_names(job)
        words = [f"{name}=" for name in settings]
        words += [f"{group}={option}" for group in groups for option in options_of(group)]
        cases.append(f"            {job}) candidates={shlex.quote(' '.join(sorted(words)))} ;;")
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.format(shell=shell, zsh=zsh, jobs=shlex.quote(" ".join(jobs)), cases="\n".join(cases))
