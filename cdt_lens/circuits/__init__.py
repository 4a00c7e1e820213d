"""Head scores, circuits, graphs, and how faithful a circuit is."""
