"""The options of a recipe, read strictly.

In: a TOML file, `key=value` overrides, or the stored config.json.
Out: a frozen `Config`, or one error with file, line, option and nearest name.
Never imports: anything of the package but `errors`.
"""
