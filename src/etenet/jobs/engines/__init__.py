"""Who captions for a job: this process, a server or a Ray cluster."""
