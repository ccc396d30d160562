"""The methods, by name. Adding one is its file, its test, and one line here.

Nothing is imported until a scenario names it; ``package.module:Class`` in a scenario reaches methods outside.
"""

METHODS = {
    "fedavg": "fedcil.methods.fedavg:FedAvg",
    "fedprox": "fedcil.methods.fedprox:FedProx",
    "oracle": "fedcil.methods.oracle:Oracle",
    "mfcl": "fedcil.methods.mfcl:MFCL",
    "fedlwf": "fedcil.methods.fedlwf:FedLwF",
    "feder": "fedcil.methods.feder:FedER",
    "afcl": "fedcil.methods.afcl:AFCL",
}
