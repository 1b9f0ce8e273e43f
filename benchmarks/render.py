"""Write the tables of docs/performance.md from the results, so that no figure there is typed by hand.

python -m benchmarks.render
"""

import json
import re
from pathlib import Path

from benchmarks import ablation, startup, tuning

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"


def main() -> None:
    """Replace what stands between the marks of each result that is there."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, module in (("tuning", tuning), ("ablation", ablation), ("startup", startup)):
        if module.RESULT.exists():
            result = json.loads(module.RESULT.read_text())
            machine = result["machine"]
            where = (
                f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} thread(s), "
                f"{machine['memory_gib']} GiB, Python {machine['python']}"
            )
            if "matmul_peak_gflops" in result:
                where += f"; bf16 matrix products reach {result['matmul_peak_gflops']} GFLOP/s"
            filled = f"<!-- {name} -->\n\n{where}.\n\n{module.table(result).strip()}\n\n<!-- end -->"
            text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, new=filled: new, text, flags=re.DOTALL)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
