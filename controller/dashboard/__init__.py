"""The read-only web page: what runs, what it costs, how long cold starts take."""
