"""Lowering of a canonical graph to the operators of an ML Program; images stay channels first.

    emitters        the table: operator of a graph -> function that builds it in MIL
       |               layers                   products, pools and norms
       |               math                     activations, elementwise operators, reductions
       |               shape                    what moves, takes and repeats numbers
       |               resize                   images
    build           the program on its way: values by name, rounded where the graph says so
       |               weights                  packed constants, written and read back
       |               names                    identifiers

`edgeq.converters.coreml.graph` goes through a graph node by node and calls the emitters.
"""
