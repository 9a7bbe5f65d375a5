"""The optimiser that runs beside a server, when nobody needs the CPU."""
