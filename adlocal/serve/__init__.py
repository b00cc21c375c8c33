"""The gateway of `adlocal serve`: who may ask what, with how much protection, before an engine under the plugin."""
