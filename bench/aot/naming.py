"""What a compiled kernel is called, the same from one run to the next."""

from __future__ import annotations

from typing import Any

NAMES = ("target", "numbers", "kernel", "mode", "batch", "hidden", "directions", "layout")


def layout(result: dict[str, Any]) -> str:
    """How a kernel is laid out, in one word: units, parts of the product, tiles, warps, and how W_hh comes."""
    if "config" in result:
        config = result["config"]
        c = {"U": config["units"], "BB": config["batch_tile"], "BK": config["inner"], "RESIDENT": config["resident"]}
        c |= {"SPLITS": config["splits"], "GROUPS": config["groups"]} if "splits" in config else {}
        options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    else:
        c, options = result["constants"], result["options"]
    warps = f"W{options['num_warps']}"
    if "U" not in c:
        return ",".join([*(f"{size}{c[size]}" for size in ("BR", "BC") if size in c), warps])
    parts = [f"{c['SPLITS']}x{c['GROUPS']}"] if "SPLITS" in c else []
    stays = "resident" if c["RESIDENT"] else f"S{options['num_stages']}"
    return ",".join([f"U{c['U']}", *parts, f"BB{c['BB']}", f"BK{c['BK']}", warps, stays])


def mode(result: dict[str, Any]) -> str:
    """Either "sequence" or "step", and of a step in two launches which one; "-" for a kernel that has no steps."""
    if "config" in result:
        return "sequence" if result["config"]["sequence"] else "step"
    c = result["constants"]
    part = "" if c.get("PRODUCT", True) and c.get("CELLS", True) else "/product" if c["PRODUCT"] else "/cells"
    return (result["mode"] or "-") + part


def name(result: dict[str, Any]) -> tuple[str, ...]:
    """`NAMES` of a kernel that was or would be compiled. One that serves every size is not called after any.

    One that a request's other sizes have in common is called after the first of them.
    """
    sized = "config" in result or "U" in result["constants"] or "BC" in result["constants"]
    sizes = [str(result[each]) if sized else "-" for each in ("batch", "hidden", "directions")]
    return (result["target"], result["numbers"], result["kernel"], mode(result), *sizes, layout(result))
