"""Lowering of a canonical graph, channels first, to the operators of a .tflite file, channels last.

    support         refuses what cannot be lowered (reasons: refusals), and says which nodes
                    compute on integers
       |
    emitters        the table: operator of a graph -> function that adds it to the file
       |               conv, linear             products and windows
       |               math_ops                 element by element, reductions
       |               shape_ops, gather        what moves, cuts, joins and selects
       |               resize                   images
    lowering        the graph on its way: values by name, each rounded or float, in several orders
       |               constants                packed and float constants, and how they are stored
       |               subgraph                 operators and their rounding
       |               axis_order               where each axis lies, so that little is moved
    operators (one folder up)    the file's own operators, written by `edgeq.converters.tflite.file`

`edgeq.converters.tflite.graph` goes through a graph node by node and calls the emitters; each layer
knows those below it only.
"""
