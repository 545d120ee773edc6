// Swift Package Manager makes this for a target with resources.
import Foundation

extension Bundle {
    static var module: Bundle { Bundle.main }
}
