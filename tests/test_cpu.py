"""Which kernels a CPU gets, and what `doctor` says of a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from llvmlite import binding

import pyllama_kernels
from pyllama_dist.cli import doctor
from pyllama_kernels import cpu, jit
from pyllama_kernels.cpu import NEEDS, KernelsError, candidates, choose, forced, known_features

HASWELL = {"avx2", "f16c", "fma"}
ICE_LAKE = {*HASWELL, "avx512f", "avx512bw", "avx512vl", "avx512vnni"}
TILES = {"amx-tile", "amx-bf16"}
NEON, DOTPROD = {"neon"}, {"neon", "dotprod"}

# CPUs, and what their makers say they have.
X86 = {
    "x86-64": set(),
    "haswell": HASWELL,
    "alderlake": {*HASWELL, "avxvnni"},
    "icelake-server": ICE_LAKE,
    "znver4": ICE_LAKE,
    "znver5": {*ICE_LAKE, "avxvnni"},
    "sapphirerapids": {*ICE_LAKE, *TILES, "avxvnni"},
}
ARM = {
    "cortex-a72": NEON,  # Raspberry Pi 4
    "cortex-a76": DOTPROD,  # Raspberry Pi 5
    "apple-m1": DOTPROD,
    "neoverse-n1": DOTPROD,
}


def given() -> str:
    return ""


def not_asked() -> str:
    raise AssertionError("the system was asked for AMX")


@pytest.mark.parametrize(
    ("machine", "has", "best"),
    [
        ("x86_64", set(), "portable"),
        ("x86_64", {"avx2"}, "portable"),
        ("x86_64", HASWELL, "avx2"),
        ("x86_64", {*HASWELL, "avxvnni"}, "avx_vnni"),
        ("x86_64", ICE_LAKE - {"avx512vnni"}, "avx2"),
        ("x86_64", ICE_LAKE, "avx512_vnni"),
        ("x86_64", {*ICE_LAKE, "avxvnni"}, "avx512_vnni"),
        ("x86_64", {*ICE_LAKE, "amx-tile"}, "avx512_vnni"),
        ("x86_64", {*ICE_LAKE, *TILES}, "amx"),
        ("x86_64", DOTPROD, "portable"),
        ("aarch64", set(), "portable"),
        ("aarch64", {"dotprod"}, "portable"),
        ("aarch64", NEON, "neon"),
        ("aarch64", DOTPROD, "neon_dotprod"),
        ("riscv64", HASWELL, "portable"),
    ],
)
def test_the_best_that_the_cpu_can_run(machine, has, best):
    found = candidates(machine, has, given)
    assert next(candidate.name for candidate in found if candidate.possible) == best


def test_candidates_say_what_is_missing():
    found = {c.name: str(c) for c in candidates("x86_64", HASWELL, not_asked)}
    assert list(found) == ["amx", "avx512_vnni", "avx_vnni", "avx2", "portable"]
    assert found["avx_vnni"] == "lacks avxvnni"
    assert found["avx512_vnni"] == "lacks avx512f, avx512bw, avx512vl, avx512vnni"
    assert found["avx2"] == found["portable"] == "possible"


def test_the_system_may_refuse_amx():
    found = candidates("x86_64", {*ICE_LAKE, *TILES}, lambda: "no")
    assert [c.name for c in found if c.possible] == ["avx512_vnni", "avx2", "portable"]
    assert str(found[0]) == "no"
    with pytest.raises(KernelsError, match="'amx' cannot run on this CPU: no; "):
        forced("amx", found)


@pytest.mark.parametrize("asked", ["avx2", "portable", "reference"])
def test_forced(asked):
    assert forced(asked, candidates("x86_64", ICE_LAKE, not_asked)) == asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("avx512_vnni", "'avx512_vnni' cannot run on this CPU: lacks avx512f,"),
        ("neon", "'neon' are for aarch64;"),
        ("mmx", "there are no kernels 'mmx';"),
        ("", "there are no kernels '';"),
    ],
)
def test_refused(asked, said):
    with pytest.raises(KernelsError) as refusal:
        forced(asked, candidates("x86_64", HASWELL, not_asked))
    assert said in str(refusal.value)
    assert str(refusal.value).endswith("PYLLAMA_KERNELS can be avx2, portable, reference")


def test_the_variable_is_read(monkeypatch):
    monkeypatch.delenv("PYLLAMA_KERNELS", raising=False)
    best = choose()
    monkeypatch.setenv("PYLLAMA_KERNELS", "")
    assert choose() == best
    monkeypatch.setenv("PYLLAMA_KERNELS", "portable")
    assert choose().name == "portable"
    assert choose().why == "as PYLLAMA_KERNELS says"
    assert choose().candidates == best.candidates
    assert choose("reference").name == "reference"
    monkeypatch.setenv("PYLLAMA_KERNELS", "quick")
    with pytest.raises(KernelsError, match="'quick'"):
        choose()


@pytest.mark.parametrize(
    ("triple", "name", "has"),
    [
        *(("x86_64-linux-gnu", name, has) for name, has in X86.items()),
        *(("aarch64-linux-gnu", name, has) for name, has in ARM.items()),
    ],
)
def test_llvm_knows_cpus_by_name(triple, name, has):
    binding.initialize_all_targets()
    wanted = sorted({f for needs in NEEDS[triple.partition("-")[0]].values() for f in needs})
    try:
        assert known_features(triple, name, "", wanted) == has
    except RuntimeError as error:
        pytest.skip(f"this LLVM compiles only for its own machine: {error}")


@pytest.mark.skipif(cpu.host().machine != "x86_64", reason="names of x86 features")
@pytest.mark.parametrize(
    ("name", "flags", "has"),
    [
        ("generic", "+avx2", {"avx2"}),
        ("generic", "+avxvnni", {"avx2", "avxvnni"}),  # which holds the other
        ("haswell", "-avx2", {"fma"}),
        ("haswell", "-avx", set()),
        ("haswell", "-avx2,+avxvnni", {"fma", "avx2", "avxvnni"}),
    ],
)
def test_flags_add_and_take_away(name, flags, has):
    triple = binding.get_process_triple()
    assert known_features(triple, name, flags, ["avx2", "avxvnni", "fma"]) == has


@pytest.mark.parametrize("name", [name for sets in NEEDS.values() for name in sets] + ["portable"])
def test_needs_are_those_of_the_kernels(name):
    if not (Path(pyllama_kernels.__file__).parent / f"isa/{name}.py").exists():
        pytest.skip(f"there is no {name} here yet")
    instruction_set = cpu.load(name).ISA
    assert instruction_set.name == name
    needs = {**NEEDS["x86_64"], **NEEDS["aarch64"], "portable": ()}
    assert set(instruction_set.features) == set(needs[name])


def test_every_set_can_be_chosen():
    files = {
        file.stem for file in (Path(pyllama_kernels.__file__).parent / "isa").glob("[a-z]*.py")
    }
    assert files & {"avx2", "neon", "portable"}
    for name in files:
        module = cpu.load(name)
        if hasattr(module, "ISA"):  # others help
            assert any(name in sets for sets in NEEDS.values()) or name == "portable"


def test_the_reference_implementations_can_be_loaded():
    assert cpu.load("reference").__name__ == "pyllama_kernels.reference"


def test_numba_is_told_another_cpu():
    """With the name alone: Numba then takes no features of this machine."""
    command = [sys.executable, "-c", "from pyllama_kernels.cpu import *; print(choose().name)"]
    changed = {"NUMBA_CPU_NAME": "generic", "PYLLAMA_KERNELS": ""}
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CPU_FEATURES"} | changed
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    # All 64-bit ARMs have NEON, and LLVM uses it even for "generic".
    assert done.stdout.strip() == ("neon" if cpu.host().machine == "aarch64" else "portable")


def test_compiled_code_is_kept_for_each_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("PYLLAMA_DIST_CACHE_DIR", str(tmp_path))
    asked = ("portable", "reference", "no such thing")
    folders = set()
    for name in asked:
        monkeypatch.setenv("PYLLAMA_KERNELS", name)
        folders.add(jit.cache_directory())
    assert len(folders) == len(asked)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine at rest whose settings are all well: tests spoil them. Its folder of settings."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(doctor, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(doctor, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    for name in ("PYLLAMA_KERNELS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def diagnosis() -> dict[str, dict]:
    done = CliRunner().invoke(doctor.command, ["--json"])
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    states = [check["state"] for check in checks.values()]
    assert set(states) <= {"ok", "note", "problem"}
    assert done.exit_code == ("problem" in states)
    assert all(check["advice"] for check in checks.values() if check["state"] != "ok")
    return checks


def test_doctor_at_rest(machine):
    found = diagnosis()
    assert found["kernels"]["facts"]["name"] == choose().name
    for candidate in choose().candidates:
        assert found[f"kernels {candidate.name}"]["facts"]["possible"] == candidate.possible
    assert found["cores"]["facts"]["threads"] >= 1
    assert found["memory"]["facts"]["total_bytes"] > found["memory"]["facts"]["available_bytes"]
    assert found["huge pages"]["state"] == found["load"]["state"] == "ok"
    assert not any(name.startswith("cpu frequency") for name in found)  # nothing to read
    shown = CliRunner().invoke(doctor.command, [])
    assert shown.exit_code == 0
    assert choose().name in shown.stdout


def test_doctor_and_a_slow_machine(machine, monkeypatch):
    (machine / "enabled").write_text("always madvise [never]\n")
    for i, (governor, driver) in enumerate([("powersave", "acpi-cpufreq"), ("ondemand", "")]):
        folder = machine / f"cpu{i}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{governor}\n")
        (folder / "scaling_driver").write_text(f"{driver}\n")
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.1, 0.1))
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    found = diagnosis()
    slow = {"load", "huge pages", "cpu frequency powersave", "NUMBA_CPU_NAME"}
    assert {name for name in slow if found[name]["state"] != "note"} == set()
    assert found["cpu frequency ondemand"]["state"] == "ok"


def test_doctor_and_a_governor_that_only_sounds_slow(machine):
    (machine / "cpu0/cpufreq").mkdir(parents=True)
    (machine / "cpu0/cpufreq/scaling_governor").write_text("powersave\n")
    (machine / "cpu0/cpufreq/scaling_driver").write_text("intel_pstate\n")
    assert diagnosis()["cpu frequency powersave"]["state"] == "ok"


def test_doctor_and_kernels_that_cannot_be_had(machine, monkeypatch):
    monkeypatch.setenv("PYLLAMA_KERNELS", "quick")
    kernels = diagnosis()["kernels"]
    assert kernels["state"] == "problem"
    assert "'quick'" in kernels["found"]
