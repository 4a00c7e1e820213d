"""Figures, tables, circuitsvis widgets and the report page of the results.

Blue is positive and red is negative in every drawing, and nothing here uses the network. Importing
this package registers how `cdt_lens.core.display` shows each type of result.
"""

from cdt_lens.viz import notebook as notebook
