"""nbdimg: tools for image files, one module a verb.

    main        the table of verbs, and what they share at start and end
    common      options and output that verbs have in common
    completion  scripts for bash and zsh, made from the verbs' parsers

A verb's module offers add_parser(subparsers) and run(options), which returns the exit status, and is imported only
when that verb is used.
"""
