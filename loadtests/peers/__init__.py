"""What runs in the peers' own environments, none of which has Headrace: one file for each kind of server.

Each finds in its environment what ../contenders.py has put there: LOADTEST_MODEL_FILE, LOADTEST_THREADS of a session,
LOADTEST_WORKERS, LOADTEST_MAX_BATCH rows and LOADTEST_PORT.
"""
