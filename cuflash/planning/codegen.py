"""From a kernel's constants to the C++ text that specialises it.

One `struct Config` of named constants is all that a kernel file is told. What is not in it is a run-time argument and never recompiles.
"""

from __future__ import annotations

from collections.abc import Mapping

CPP_ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float8_e4m3fn": "float8_e4m3fn"}


def config_text(element: str, constants: Mapping[str, int | bool | str]) -> str:
    """Return the text of `struct Config`.

    Args:
        element: "float16", "bfloat16" or "float32".
        constants: C++ names in capitals to values; a bool becomes `bool`, an int `int`. A str is a C++ type that the name becomes an alias of.
    """
    lines = ['#include "ptx/types.cuh"', "struct Config {", f"  using Element = {CPP_ELEMENTS[element]};"]
    for name, value in constants.items():
        if isinstance(value, str):
            lines.append(f"  using {name} = {value};")
        elif isinstance(value, bool):
            lines.append(f"  static constexpr bool {name} = {'true' if value else 'false'};")
        else:
            lines.append(f"  static constexpr int {name} = {value};")
    lines.append("};")
    return "\n".join(lines) + "\n"
