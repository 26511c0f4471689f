"""The options: what a recipe may say, read strictly.

In: a TOML file, `key=value` overrides, or the stored config.json.
Out: a frozen `Config`, or one sentence with file, line, option and nearest name.
Never imports: anything of the package but `errors`.
"""
