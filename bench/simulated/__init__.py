"""A day of requests on replicas that serve many adapters, simulated: see bench/fleet.py.

costs      seconds and bytes: from records where there are any
traffic    which requests come when, and which adapters they name
routing    which replica a request goes to
replica    one engine: its batch, its pool, and the host and disk behind it
fleet      all of them together, with replicas that die and join
"""
