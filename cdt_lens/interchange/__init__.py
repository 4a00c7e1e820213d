"""Circuit graphs in the file formats of other tools: MIB, EAP-IG, GraphML."""
