from flashcore.cli import main

main()
