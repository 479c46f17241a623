"""What keeps a run honest: ranks that are alike, replicas that stay alike, steps that are finite, requests to
stop.
"""
