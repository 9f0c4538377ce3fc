"""The video package in processes that a hostile clip cannot get out of."""
