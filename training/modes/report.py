"""`--mode report`: build report.html again from what a run has recorded."""

from __future__ import annotations

import json
from pathlib import Path

from training.config.sigma_config import SigmaConfig
from training.runtime.report_html import write_report


def run(config: SigmaConfig) -> int:
    """Write `<output_dir>/report.html` and print its path; ValueError if there is no run."""
    path = write_report(Path(config.run.output_dir))
    print(json.dumps({"report": str(path)}) if config.run.json else path)
    return 0
