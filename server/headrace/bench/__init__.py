"""``headrace bench``: a served model under load, from one client up to where more clients gain nothing."""
