"""The control plane: gateway, scaling, ledger, dashboard. Imports no torch, needs no GPU."""
