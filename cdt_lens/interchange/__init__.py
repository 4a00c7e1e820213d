"""Read and write circuit graphs in the file formats of other tools.

- `.json` is the circuit graph of MIB (arXiv 2504.13151) and EAP-IG (arXiv 2403.17806). `cfg` holds
  the model's shape, and `nodes` and `edges` hold `in_graph` and `score` of each. The names `a9.h6`,
  `m3`, `input` and `logits` become `L9H6`, `M3`, `input` and `logits`.
- `.pt` is the same as tensors: `cfg`, `src_nodes`, `dst_nodes`, `edges_scores`, `edges_in_graph`
  and `nodes_in_graph`.
- `.graphml` is GraphML, for networkx, Gephi and others.
- `.dot` is Graphviz, for writing only.

`mib_submission` writes and checks the folder that MIB's leaderboard takes.

Scores of another tool keep their sign and unit, which `Graph.unit` names. See
docs/method/interchange.md.
"""
