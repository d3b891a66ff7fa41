"""Results as a run leaves them, made up."""

from typing import Any

from benchmarks.session import TUNED


def entry(kind: str, ms: float | None, **others: Any) -> dict[str, Any]:
    time = None if ms is None else {"ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "rounds": 7, "calls": 1}
    base = {"kind": kind, "absent": None, "refused": None, "failed": None, "first_call_s": 0.5, "time": time}
    return base | {"gate": {"random": {"loss": 1e-7, "gradient": 2e-7}, "near": None}} | others


def record(setting: str = TUNED, ms: float = 4.0, objective: str = "kd", **others: Any) -> dict[str, Any]:
    return {
        "case": {"objective": objective, "rows": 1120, "classes": 10000, "dtype": "fp32", "regime": "random"},
        "setting": setting,
        "bytes": 134_400_000,
        "sets": 3,
        "automatic": "ban_fast native",
        "streams_gb_s": {"copy": 60.0, "2R1W": 67.2},
        "providers": {
            "ban_fast reference": entry("ban_fast", 200.0),
            "ban_fast native": entry("ban_fast", ms),
            "eager kl_div": entry("eager", 30.0),
            "eager soft-CE": entry("eager", 14.0),
            "compile kl_div": entry("compile", 10.0),
            "compile soft-CE": entry("compile", None, refused="gradient off by 1e-01 at random logits"),
            "Liger KLDIV": entry("liger", None, absent="liger-kernel is not installed", gate={}),
        },
        **others,
    }


def results(device: str = "cpu", date: str = "2025-01-02", **others: Any) -> dict[str, Any]:
    hardware = {"cpu": "Model X", "cores": 2, "threads": 2, "vector": "AVX512", "l3": "32M", "libc": "glibc 2.36"}
    return {
        "device": device,
        "machine": hardware | ({"gpu": {"name": "Card Y"}} if device == "cuda" else {}),
        "versions": {"torch": "9.9", "triton": None},
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "date": date,
        "load_at_start": 0.1,
        "complete": True,
        "checks": [],
        "left_out": [],
        "failures": [],
        "records": [record()],
        **others,
    }
