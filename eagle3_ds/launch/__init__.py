"""Launching ranks: the command that starts them, a supervisor for each, their logs, restarts.

The supervisor imports only the standard library, so that it needs little memory and keeps running when its
rank breaks. Therefore this file imports nothing.
"""
