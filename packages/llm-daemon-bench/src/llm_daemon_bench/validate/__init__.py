"""Are our numbers true?  Each step holds them against a reference and gives lines of agreement.

`known`: a scripted server of known times (V0).  `told`: what a server says of itself, in any results (V1).
`engine`: `llama-bench` (V2).  `others`: independent tools on one server (V3, V4).
"""
