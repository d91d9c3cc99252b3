"""The Responses API: another view of the turns that chat completions answer."""
