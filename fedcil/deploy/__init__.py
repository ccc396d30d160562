"""A scenario on real Flower servers: keys, processes, health, supervision. Flower's own programs do the work.

``fedcil deploy local`` runs all roles as processes of this machine; docker-compose.yml runs each in a container.
"""
