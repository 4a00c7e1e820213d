"""Run whole experiments in a run directory, whose finished stages are kept.

- Discovery (`runs.py`, `discovery.py`): `run.json` (the settings), `baseline`, `scores`, `circuit`,
  `ablation` and `faithfulness` (JSON with tensors beside it), and `report.html`.
- Comparison (`compare.py`): the kept scores of every method, `comparison.json`, `comparison.csv`,
  `comparison.png` and `report.html`.
- Transfer (`transfer.py`, `demo.py`): `transfer.json` (the settings), `proxy/` (the proxy
  checkpoint), `discovery/`, the kept cells, `result.json`, `cells.csv`, `summary.csv`, figures and
  `report.html`.

Every file is written whole or not at all. A stage whose file exists for the same settings is not
run again, and an interrupted stage resumes.
"""
