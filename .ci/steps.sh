# What .ci/run and .ci/matrix share: steps in subshells, environments, a summary. Sourced, not run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
"$python" -c pass 2>/dev/null || python="$(command -v python3)" # a shim of a version that is not there
export MPLBACKEND=agg PIP_DISABLE_PIP_VERSION_CHECK=1
exec </dev/null

# step NAME "what it does" COMMAND...: runs it in a subshell with set -e; a failure fails the run, the rest still runs.
step() {
    local name="$1" what="$2" start="$SECONDS" code line
    shift 2
    if [[ -n "${JAXZS_CI_STEPS:-}" && " $JAXZS_CI_STEPS " != *" $name "* ]]; then return; fi
    printf '\n==== %s (at %d s) %s\n' "$name" "$SECONDS" "$what"
    set +e
    (set -euo pipefail; "$@") 2>&1 | tee "$temp/$name.log"
    code="${PIPESTATUS[0]}"
    set -e
    line="$(grep -E '^=* ?[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s' "$temp/$name.log" | tail -1 | tr -d '=' || true)"
    printf '%-7s %4d s  %-10s %s %s\n' "$([[ $code == 0 ]] && echo ok || echo FAILED)" $((SECONDS - start)) "$name" "$what" \
        "${line:+[$(xargs <<<"$line")]}" >>"$temp/summary"
    [[ $code == 0 ]] || touch "$temp/failed"
}

left_out() { printf '%-7s %4d s  %-10s %s\n' "left out" 0 "$1" "$2" >>"$temp/summary"; }

# environment NAME [INTERPRETER]: an empty virtual environment at $temp/NAME.
environment() { "${2:-$python}" -m venv "$temp/$1"; }

# install NAME REQUIREMENT...: by uv where the tools environment has it (5 s instead of 50), else by pip.
install() {
    local name="$1"
    shift
    if [[ -x "$temp/tools/bin/uv" ]] && "$temp/tools/bin/uv" pip install -q --python "$temp/$name/bin/python" "$@"; then
        return
    fi
    "$temp/$name/bin/python" -m pip install -q "$@"
}

versions() {
    "$temp/$1/bin/python" - <<'PY'
import sys
from importlib.metadata import distributions

names = "jax flax optax chex numpy transformers tensorflow-datasets torch".split()
found = {d.metadata["Name"]: d.version for d in distributions()}
print("python", sys.version.split()[0], *(f"{n} {found[n]}" for n in names if n in found), f"({len(found)} packages)")
PY
}
